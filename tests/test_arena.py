"""Packed prompts in a store of fixed addresses: read as they were written, wherever they lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from packs import DEVICE, random_packed
from stores import EVENLY, HEADS, LAYERS, filled, make_arena, packed_bytes

from rdkv.kernels import naive_decode, naive_pack
from rdkv.kernels.arena_shape import EVEN
from rdkv.kernels.packed import unquantised

UNEVENLY = (EVEN // 4, EVEN * 7 // 4)


@pytest.mark.parametrize("shares", [EVENLY, UNEVENLY])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_what_is_written_is_read(dim: int, shares: tuple[int, ...]) -> None:
    prompts = {2: random_packed(1, HEADS, 90, dim), 1: random_packed(1, HEADS, 33, dim)}
    arena = filled(prompts, dim, shares)
    for layer in range(LAYERS):
        view = arena.view(layer, [1, 2], prompts[1].host_counts + prompts[2].host_counts)
        rows = [*naive_pack.unpack(view)]
        for i, packed in enumerate((prompts[1], prompts[2])):
            part = slice(i * HEADS, (i + 1) * HEADS)
            for got, wanted in zip(rows, naive_pack.unpack(packed), strict=True):
                torch.testing.assert_close(got[part, : wanted.shape[1]], wanted)


def test_a_place_is_used_again() -> None:
    arena = filled({1: random_packed(1, HEADS, 90, 64)}, 64)
    later = random_packed(1, HEADS, 20, 64)
    region = slice(0, arena.shape.layer_bytes(packed_bytes(later)))
    arena.write(0, 1, region, later)
    got = naive_pack.unpack(arena.view(0, [1], later.host_counts))
    for a, b in zip(got, naive_pack.unpack(later), strict=True):
        torch.testing.assert_close(a, b)
    arena.clear(1)
    assert int(arena.counts.sum()) == 0
    assert int(arena.prompt_tokens[1]) == 0


def test_a_prompt_that_exceeds_its_region_is_refused() -> None:
    arena, packed = make_arena(64), random_packed(1, HEADS, 90, 64)
    with pytest.raises(ValueError, match="layer 1: a packed prompt exceeds its 256 bytes"):
        arena.write(1, 1, slice(0, 256), packed)
    uneven = make_arena(64, shares=UNEVENLY)
    with pytest.raises(ValueError, match="layer 0: a packed prompt exceeds its 512 bytes"):
        uneven.write(0, 1, slice(0, 8 * 256), packed)


def test_a_prompt_under_another_rotation_is_refused() -> None:
    arena, packed = make_arena(64), replace(random_packed(1, HEADS, 90, 64), span=1)
    with pytest.raises(ValueError, match="values are rotated over 1 channels, those of the arena over 64"):
        arena.write(0, 1, slice(0, 64 * 256), packed)
    arena.write(0, 1, slice(0, 64 * 256), unquantised(*torch.randn(2, 1, HEADS, 7, 64, device=DEVICE).bfloat16()))


def test_unequal_stores_are_read_as_equal_ones() -> None:
    """Attention to the bit; tables differ in where things start alone."""
    prompts = {3: random_packed(1, HEADS, 120, 64), 0: random_packed(1, HEADS, 50, 64)}
    even, uneven = filled(prompts, 64), filled(prompts, 64, UNEVENLY)
    assert [table.key_codes.nbytes for table in uneven.layers] == [*uneven.shape.store_bytes]
    assert uneven.shape.store_bytes[1] == 7 * uneven.shape.store_bytes[0]
    assert torch.equal(even.counts, uneven.counts)
    assert torch.equal(even.prompt_tokens, uneven.prompt_tokens)
    query, counts = torch.randn(2, HEADS * 3, 1, 64, device=DEVICE), prompts[0].host_counts + prompts[3].host_counts
    for layer in range(LAYERS):
        views = (arena.view(layer, [0, 3], counts) for arena in (even, uneven))
        (output, lse), (again, lse_again) = (naive_decode.attend(query, view, 0.125) for view in views)
        assert torch.equal(output, again)
        assert torch.equal(lse, lse_again)


def test_unquantised() -> None:
    keys, values = torch.randn(2, 2, HEADS, 7, 64)
    packed = unquantised(keys, values)
    read_keys, read_values, held = naive_pack.unpack(packed)
    assert torch.equal(read_keys.view_as(keys), keys)
    assert torch.equal(read_values.view_as(values), values)
    assert bool(held.all())
    assert all(row[4] == 7 for row in packed.host_counts)
    assert torch.equal(packed.counts[:, :7].cpu(), torch.tensor(packed.host_counts, dtype=torch.int32))
