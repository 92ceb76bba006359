"""Eviction keeps the tokens of highest score whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from problems import (
    SCOPES,
    Problem,
    problems,
    quick,
    shares,
)


@pytest.mark.parametrize("scope", SCOPES)
@quick
@given(problem=problems(ties=False), share=shares)
def test_eviction_keeps_the_top_scores_at_16_bits(scope: str, problem: Problem, share: float) -> None:
    plan = problem.allocate(share, "eviction", scope=scope)
    kept, heads = plan.kept, problem.scores.token.shape[1]
    assert torch.equal(plan.value_bits, kept.byte() * 16)
    assert torch.equal(plan.key_bits, (kept.any(-1, keepdim=True) * 16).expand(plan.key_bits.shape).byte())
    assert not bool(plan.pinned.any())
    groups = kept.flatten(0, 1) if scope == "head" else kept.flatten(1)
    token = problem.scores.token.reshape(groups.shape)
    if scope != "head":  # heads compete by their share of the layer's scores
        token = problem.scores.token.flatten(1)
    worst_kept = token.masked_fill(~groups, float("inf")).amin(-1)
    best_evicted = token.masked_fill(groups, 0.0).amax(-1)
    assert bool((worst_kept >= best_evicted).all())
    ladder, budget = problem.ladder, problem.budget(share)
    if share < 1:
        competing = 1 if scope == "head" else heads
        room = competing * (budget.per_head - ladder.head_cost)
        each = ladder.value_cost[-1] + 16 * ladder.head_dim
        fits = min(max(room // each, 0), groups.shape[-1])
        assert bool((groups.sum(-1) == fits).all())
