"""Filling a budget with tokens against the same one upgrade at a time."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdkv.allocators.fill import fill
from rdkv.allocators.levels import hull, thresholds
from rdkv.plugins.rdkv.format import MixedBit


def fill_slowly(weights: Tensor, cost: list[list[int]], eps: list[float], available: int) -> list[list[int]]:
    """Levels of tokens ``[h][T]``: upgrades along the hull by gain per bit, all that fit, then those that still fit."""
    heads, tokens = weights.shape
    upgrades = []
    for h in range(heads):
        on_hull = [0, *(i + 1 for i, on in enumerate(hull(thresholds(torch.tensor(cost[h]), torch.tensor(eps)))) if on)]
        for t, (low, high) in itertools.product(range(tokens), itertools.pairwise(on_hull)):
            bits = cost[h][high] - cost[h][low]
            upgrades.append((-float(weights[h, t]) * (eps[low] - eps[high]) / bits, h, t, low, high, bits))
    level = [[0] * tokens for _ in range(heads)]
    fits = True
    for sweep in range(2):
        for _, h, t, low, high, bits in sorted(upgrades):
            if level[h][t] == low and (fits or sweep) and bits <= available:
                level[h][t], available = high, available - bits
            elif not sweep:
                fits = False
    return level


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 3),
    tokens=st.integers(1, 12),
    key_bits=st.lists(st.sampled_from([0, 3, 32, 100, 512]), min_size=3, max_size=3),
    share=st.floats(0, 1.1),
    seed=st.integers(0, 2**31),
)
def test_fill_takes_what_fits_by_gain_per_bit(
    heads: int, tokens: int, key_bits: list[int], share: float, seed: int
) -> None:
    ladder = MixedBit().ladder(32, tokens)
    weights = torch.randn(2, heads, tokens, generator=torch.Generator().manual_seed(seed)).exp().double()
    cost = [[c + (c > 0) * key_bits[h] for c in ladder.value_cost] for h in range(heads)]
    available = [int(share * tokens * sum(c[-1] for c in cost)), tokens * 70]
    level = fill(
        weights,
        torch.ones(weights.shape, dtype=torch.bool),
        torch.tensor(cost).expand(2, -1, -1),
        torch.tensor(ladder.value_distortion, dtype=torch.float64),
        torch.tensor(available),
    )
    for p in range(2):
        assert level[p].tolist() == fill_slowly(weights[p], cost, list(ladder.value_distortion), available[p])
