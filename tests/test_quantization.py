"""Quantisation keeps every token, or says what the least budget is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    SCOPES,
    Problem,
    make,
    overspent,
    problems,
    quick,
    random_problem,
    uniform,
)

from rdkv.runtime.errors import BudgetError
from rdkv.runtime.plan import Budget, Scores


@pytest.mark.parametrize("mode", ["mixed", "uniform"])
@pytest.mark.parametrize("scope", SCOPES)
@quick
@given(problem=st.one_of(problems(pins=True), problems(pins=True, block=16)), share=st.floats(0.1, 1.2))
def test_quantization_evicts_nothing(mode: str, scope: str, problem: Problem, share: float) -> None:
    share = min(share, 1.0)
    ladder, budget = problem.ladder, problem.budget(share)
    costs = {b: int(ladder.cost(uniform(problem, b)).amax()) for b in ladder.value_bits if b > 0}  # of one head
    if costs[2] > budget.per_head and costs[16] > budget.per_head:
        with pytest.raises(BudgetError, match=f"2 bits take {costs[2] / ladder.full_cost:.1%} of the full cache"):
            problem.allocate(share, "quantization", scope=scope, mode=mode)
        return
    plan = problem.allocate(share, "quantization", scope=scope, mode=mode)
    assert overspent(problem, plan, budget, scope) <= 0
    assert int(plan.value_bits.min()) >= 2
    assert int(plan.key_bits.min()) >= 2
    widest = max(b for b, cost in costs.items() if cost <= budget.per_head)
    if mode == "uniform" or widest == 16:
        assert bool((plan.value_bits == widest).all())
        assert bool((plan.key_bits == widest).all())


@pytest.mark.parametrize("block", [1, 16])
def test_quantization_fits_what_it_says_is_the_least(block: int) -> None:
    problem = random_problem(tokens=300, dim=64, block=block)
    ladder = problem.ladder
    least = int(ladder.cost(uniform(problem, 2)).amax())
    for mode in ("mixed", "uniform"):
        allocator = make("quantization", mode=mode)
        plan = allocator.allocate(problem.scores, ladder, Budget(least, 2))
        assert bool((plan.value_bits == 2).all())
        with pytest.raises(BudgetError, match=r"2 bits take 1\d\.\d% of the full cache"):
            allocator.allocate(problem.scores, ladder, Budget(least - 1, 2))


@pytest.mark.parametrize("share", [0.21, 0.25, 0.3, 0.356, 0.4, 0.5, 0.7])
@pytest.mark.parametrize("scope", SCOPES)
def test_quantization_needs_no_more_where_a_key_upgrade_would_be_too_much(share: float, scope: str) -> None:
    for seed in range(4):  # one group: the keys of every token rise together
        problem = random_problem(1, 2, 5, 80, group=256, spread=0.3, seed=seed)
        if overspent(problem, uniform(problem, 2), problem.budget(share), "head") <= 0:
            plan = problem.allocate(share, "quantization", scope=scope)
            assert overspent(problem, plan, problem.budget(share), scope) <= 0


def test_quantization_pins_nothing() -> None:
    problem = random_problem(tokens=50)
    pinned = torch.arange(50).expand(1, 2, 50) < 4
    plan = Problem(Scores(problem.scores.token, problem.scores.channel, pinned), problem.ladder)
    assert not bool(plan.allocate(0.3, "quantization").pinned.any())
