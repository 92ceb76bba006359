"""Filling a budget with tokens against the same one upgrade at a time."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdkv.allocators.fill import fill, unspent
from rdkv.allocators.levels import hull, thresholds
from rdkv.allocators.steps import Steps, step_table
from rdkv.allocators.waterlevel import make_search
from rdkv.plugins.rdkv.format import MixedBit


def fill_slowly(
    weights: Tensor, cost: list[list[int]], eps: list[float], available: int, sweeps: int
) -> list[list[int]]:
    """Levels of tokens ``[h][T]``: upgrades along the hull by gain per bit, all that fit; then those that still fit."""
    heads, tokens = weights.shape
    upgrades = []
    for h in range(heads):
        on_hull = [0, *(i + 1 for i, on in enumerate(hull(thresholds(torch.tensor(cost[h]), torch.tensor(eps)))) if on)]
        for t, (low, high) in itertools.product(range(tokens), itertools.pairwise(on_hull)):
            bits = cost[h][high] - cost[h][low]
            upgrades.append((-float(weights[h, t]) * (eps[low] - eps[high]) / bits, h, t, low, high, bits))
    level = [[0] * tokens for _ in range(heads)]
    fits = True
    for sweep in range(sweeps):
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
    """All that fits up to the first upgrade that does not is the same; of the rest, it gets as much or nearly so."""
    ladder = replace(MixedBit().ladder(32, tokens), token_block=1, key_block=1)
    weights = torch.randn(2, heads, tokens, generator=torch.Generator().manual_seed(seed)).exp().double()
    weights = weights.sort(-1).values / weights.sum((1, 2), keepdim=True)
    cost = [[c + (c > 0) * key_bits[h] for c in ladder.value_cost] for h in range(heads)]
    available = torch.tensor([[int(share * tokens * sum(c[-1] for c in cost))], [tokens * 70]], dtype=torch.float64)
    table = step_table(ladder, tokens, torch.device("cpu"))
    steps = Steps.of(table.rows[[1 + key_bits[h] for h in range(heads)]].expand(2, -1, -1))
    search = make_search(2.0, table.octaves, True, torch.device("cpu"))
    need = steps.whole.sum(1) - available
    boundary = fill(weights, steps, need, False, search.first, search, 3)
    made = torch.arange(tokens).view(-1, 1) >= boundary.unsqueeze(2)  # [P, h, T, S]
    width = steps.width.gather(-1, made.sum(-1)).long()
    for p in range(2):
        spent = [[cost[h][ladder.value_bits.index(b)] for b in row] for h, row in enumerate(width[p].tolist())]
        left = int(available[p]) - sum(map(sum, spent))
        assert left == int(unspent(steps, boundary, need)[p]) >= 0
        prefix, best = (
            torch.tensor(fill_slowly(weights[p], cost, list(ladder.value_distortion), int(available[p]), sweeps))
            for sweeps in (1, 2)
        )
        level = torch.tensor([[ladder.value_bits.index(b) for b in row] for row in width[p].tolist()])
        assert bool((level >= prefix).all())
        loss = torch.tensor(ladder.value_distortion, dtype=torch.float64)
        saved = (weights[p] * (loss[prefix] - loss[level])).sum()
        most = (weights[p] * (loss[prefix] - loss[best])).sum()
        assert float(saved) >= 0.5 * float(most)


def test_equal_weights_are_filled_alike() -> None:
    ladder = replace(MixedBit().ladder(32, 1000), token_block=1, key_block=1)
    table = step_table(ladder, 1000, torch.device("cpu"))
    steps = Steps.of(table.rows[1].expand(1, 2, -1))
    search = make_search(2.0, table.octaves, False, torch.device("cpu"))
    weights = torch.full((1, 2, 1000), 1 / 2000, dtype=torch.float64)
    need = steps.whole.sum(1) - 1_000_000.0
    boundary = fill(weights, steps, need, False, search.first, search, 1)
    assert 0 <= float(unspent(steps, boundary, need)) < float(steps.price.amax())
    assert bool((boundary.amin(-1) < 1000).all())
    assert int((boundary[:, 0] - boundary[:, 1]).abs().max()) <= 32
