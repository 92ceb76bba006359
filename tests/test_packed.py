"""Prompts put together and taken apart again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from packs import random_packed

from rdkv.kernels.packed import Packed, join, split


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
