"""Packing and unpacking in plain PyTorch, against a reader that takes one digit at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packs import KEY_WIDTHS, VALUE_WIDTHS, read_keys, read_values
from torch import Tensor

from rdkv.kernels import naive_pack, naive_rotation
from rdkv.kernels.packed import CHANNEL_BITS, COLUMNS, NIBBLES, PINNED, TOKENS, VALUE_AFFINE_START, Packed

SHARES = st.lists(st.integers(0, 4), min_size=6, max_size=6).filter(any)  # of the widths


def random_packed(tokens: int, dim: int, seed: int, key_shares: list[int]) -> tuple[Packed, Tensor]:
    """Two heads with tokens of every width and pinned ones, and the widths of their key channels, ``[2, D]``."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 1, 2, tokens, dim, generator=generator)
    value_bits = VALUE_WIDTHS[torch.randint(5, (1, 2, tokens), generator=generator)]
    drawn = torch.multinomial(torch.tensor(key_shares).float(), 2 * dim, True, generator=generator)
    key_bits = KEY_WIDTHS[drawn].reshape(1, 2, dim)
    pinned = torch.rand(1, 2, tokens, generator=generator) < 0.1
    return naive_pack.pack(keys, values, value_bits, key_bits, pinned), key_bits[0]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.sampled_from([1, 5, 33, 64]), st.integers(0, 2**31), SHARES)
@example(70, 64, 0, [0, 0, 1, 0, 0, 0])
@example(40, 33, 0, [0, 0, 0, 0, 0, 1])
@example(40, 33, 0, [0, 0, 0, 1, 0, 0])
@example(40, 33, 0, [0, 1, 0, 0, 0, 0])
@example(40, 33, 0, [1, 0, 0, 0, 0, 0])
def test_codes_are_where_they_are_said_to_be(tokens: int, dim: int, seed: int, shares: list[int]) -> None:
    packed, key_bits = random_packed(tokens, dim, seed, shares)
    keys, values, _ = naive_pack.unpack(packed)
    for row, counts in enumerate(packed.host_counts):
        coded = slice(counts[PINNED], counts[PINNED] + counts[TOKENS])
        key_codes, (scale, zero) = read_keys(packed, row), packed.key_affine[row].float().unbind(1)
        assert bool((key_codes < 1 << key_bits[row].int()).all())
        assert torch.equal(keys[row, coded], key_codes * scale + zero)
        affine = packed.value_affine[packed.starts[row, VALUE_AFFINE_START] :][: counts[TOKENS]].float()
        rotated = read_values(packed, row) * affine[:, :1] + affine[:, 1:]
        assert torch.equal(values[row, coded], naive_rotation.restore(rotated, packed.span))
        empty = torch.full((dim,), 16 if packed.raw[row] else 0)
        assert naive_pack.key_widths(packed)[row].tolist() == (key_bits[row] if counts[TOKENS] else empty).tolist()


@pytest.mark.parametrize(
    ("widths", "nibbles", "pairs"),
    [
        ({}, [], []),
        ({3: 2, 7: 2}, [], [(3, 0), (7, 0)]),
        ({1: 4, 3: 2}, [], [(3, 0), (1, 0), (1, 2)]),
        ({1: 6, 3: 4, 5: 2}, [], [(5, 0), (1, 4), (1, 0), (1, 2), (3, 0), (3, 2)]),
        (dict.fromkeys(range(17), 6), [(c, 0) for c in range(16)], [*((c, 4) for c in range(17)), (16, 0), (16, 2)]),
        ({1: 16, 3: 8}, [], [(c, s) for c, n in ((1, 0), (3, 0), (1, 4), (3, 4), (1, 8), (1, 12)) for s in (n, n + 2)]),
        (dict.fromkeys(range(16), 4), [(c, 0) for c in range(16)], []),
        (dict.fromkeys(range(9), 8), [*((c, 0) for c in range(9)), *((c, 4) for c in range(7))],
         [(7, 4), (7, 6), (8, 4), (8, 6)]),
    ],
)  # fmt: skip
def test_columns_are_in_order_of_weight_then_channel(
    widths: dict[int, int], nibbles: list[tuple[int, int]], pairs: list[tuple[int, int]]
) -> None:
    found = naive_pack.key_columns(torch.tensor([widths.get(channel, 0) for channel in range(20)]))
    entries = [[channel | shift // 2 << CHANNEL_BITS for channel, shift in part] for part in (nibbles, pairs)]
    assert found[0].tolist() == entries[0]
    assert found[1].tolist() == entries[1] + [-1] * (-len(pairs) % 16)


def test_counts_say_where_columns_end() -> None:
    packed, key_bits = random_packed(30, 64, 1, [1, 1, 1, 1, 1, 0])
    for counts, bits in zip(packed.host_counts, key_bits.int(), strict=True):
        digits = int((bits // 4).sum())
        assert counts[NIBBLES] == digits // 16 * 16
        assert counts[COLUMNS] == -(-int(bits.sum()) // 32) * 16
