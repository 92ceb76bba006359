"""Sizes of the packed layout, and packed sequences joined and taken apart again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from packs import random_packed

from rdkv.kernels import naive_pack
from rdkv.kernels.packed import NIBBLES, Packed, ValuePlane, join, layout, split, value_planes


@pytest.mark.parametrize(
    ("counts", "planes", "words"),
    [
        ((0, 0, 0, 0), [(4, 0, 0, 0), (4, 4, 0, 0), (4, 8, 0, 0), (4, 12, 0, 0), (2, 0, 0, 0)], 0),
        ((40, 0, 0, 0), [(4, 0, 0, 0), (4, 4, 0, 0), (4, 8, 0, 0), (4, 12, 0, 0), (2, 0, 0, 3)], 6),
        ((40, 17, 0, 0), [(4, 0, 0, 2), (4, 4, 0, 0), (4, 8, 0, 0), (4, 12, 0, 0), (2, 0, 2, 3)], 10),
        ((40, 33, 16, 1), [(4, 0, 0, 3), (4, 4, 0, 1), (4, 8, 0, 1), (4, 12, 0, 1), (2, 0, 3, 3)], 24),
    ],
)
def test_planes_hold_the_blocks_that_need_them(
    counts: tuple[int, ...], planes: list[tuple[int, int, int, int]], words: int
) -> None:
    found = value_planes(counts)
    assert found == tuple(ValuePlane(*plane) for plane in planes)
    assert sum(plane.words(5) for plane in found) == 5 * words


def test_rows_follow_one_another() -> None:
    starts, sizes = layout(((20, 3, 0, 0, 7, 48, 16), (0, 0, 0, 0, 2, 0, 0), (16, 16, 0, 0, 0, 32, 16)), 8)
    assert starts == [[0, 0, 0, 0, 0], [192, 48, 32, 20, 7], [192, 48, 32, 20, 9]]
    assert sizes == [192 + 64, 48 + 32, 32 + 16, 36, 9]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_joined_parts_unpack_as_they_did_apart(order: list[int]) -> None:
    parts = [random_packed(batch, tokens=tokens, dim=33, device="cpu") for batch, tokens in ((2, 30), (1, 9))]
    joined = join(parts, order)
    assert (joined.batch, joined.heads, joined.dim) == (3, 2, 33)
    assert [tuple(row[: NIBBLES + 1]) for row in joined.counts.tolist()] == list(joined.host_counts)
    keys, values, held = naive_pack.unpack(joined)
    alone = [(part, b) for part in parts for b in range(part.batch)]
    for i, (part, b) in enumerate(alone[j] for j in order):
        for row, single in enumerate(range(2 * b, 2 * b + 2), 2 * i):
            k, v, h = naive_pack.unpack(part)
            assert torch.equal(keys[row, held[row]], k[single, h[single]])
            assert torch.equal(values[row, held[row]], v[single, h[single]])
            assert torch.equal(joined.counts[row], part.counts[single])
            assert joined.raw[row] == part.raw[single]


def test_what_cannot_be_joined_is_named() -> None:
    one = random_packed(1, tokens=5, dim=32)
    for odd in (random_packed(1, heads=1, tokens=5, dim=32), random_packed(1, tokens=5, dim=32, dtype=torch.half)):
        with pytest.raises(ValueError, match="parts differ"):
            join([one, odd], [0, 1])
    with pytest.raises(ValueError, match="each of the parts' sequences once"):
        join([one, one], [0, 0])


def same(a: Packed, b: Packed) -> bool:
    """Whether two prompts are the same to the bit."""
    sizes = [(p.batch, p.heads, p.dim, p.host_counts, p.raw) for p in (a, b)]
    return sizes[0] == sizes[1] and all(map(torch.equal, a.tensors(), b.tensors()))


@pytest.mark.parametrize("rows", [([0, 1], [2, 3, 4]), ([1, 4], [0, 3, 2]), ([4, 0], [3, 1, 2])])
def test_split_undoes_join(rows: tuple[Sequence[int], Sequence[int]]) -> None:
    parts = [random_packed(batch=2, tokens=90, device="cpu"), random_packed(batch=3, tokens=41, device="cpu")]
    placed = [row for part in rows for row in part]
    whole = join(parts, sorted(range(5), key=placed.__getitem__))
    for part, own in zip(parts, rows, strict=True):
        assert same(split(whole, own), part)


def test_what_is_split_shares_nothing() -> None:
    packed = random_packed(device="cpu")
    apart = split(packed, [0, 1])
    assert same(apart, packed)
    held = {t.data_ptr() for t in packed.tensors()}
    assert not held & {t.data_ptr() for t in apart.tensors()}
