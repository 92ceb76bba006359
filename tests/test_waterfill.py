"""Waterfill against every plan there is, and its options."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    SCOPES,
    Problem,
    distortion,
    make,
    make_problem,
    overspent,
    problems,
    random_problem,
    scopes,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rdkv.allocators import waterfill
from rdkv.allocators.levels import hull, thresholds
from rdkv.allocators.waterlevel import key_points
from rdkv.runtime.errors import BudgetError, ConfigError
from rdkv.runtime.ladder import Ladder
from rdkv.runtime.plan import BitPlan, Budget, Scores


@pytest.mark.parametrize(
    ("heads", "tokens", "seed", "low", "high"),
    [
        (3, 17, 0, 0.10, 0.16),
        (3, 17, 1, 0.01, 0.05),
        (3, 17, 2, 0.5, 0.56),
        (3, 17, 3, 0.9, 1.01),
        (2, 8, 286, 0.08, 0.16),  # one choice of key widths fits both heads, the other leaves one without a token
        (4, 17, 92, 0.02, 0.06),
    ],
)
@pytest.mark.parametrize("scope", ["head", "layer"])
def test_many_close_budgets(heads: int, tokens: int, seed: int, low: float, high: float, scope: str) -> None:
    problem = random_problem(1, heads, tokens, spread=4.0, seed=seed)
    lost = None
    for share in torch.linspace(low, high, 60).tolist():
        loses = distortion(problem, problem.allocate(share, scope=scope), scope)
        assert lost is None or bool((loses <= lost + 1e-9).all())
        lost = loses


def only(choices: tuple[Tensor, ...], water: Tensor, pick: int) -> tuple[tuple[Tensor, ...], Tensor]:
    return choices[pick : pick + 1], water


@pytest.mark.parametrize(("seed", "tokens", "spread", "share"), [(3, 8, 4.0, 0.2), (4, 8, 4.0, 0.3), (0, 20, 4.0, 0.2)])
def test_the_better_of_two_choices_of_key_widths(
    seed: int, tokens: int, spread: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = random_problem(1, 2, tokens, spread=spread, seed=seed)
    lost = float(distortion(problem, problem.allocate(share, scope="layer"), "layer"))
    alone = []
    for pick in (0, 1):
        monkeypatch.setattr(waterfill, "key_points", lambda *given, pick=pick: only(*key_points(*given), pick))
        alone.append(float(distortion(problem, problem.allocate(share, scope="layer"), "layer")))
    assert lost == min(alone)


def every_plan(heads: int, tokens: int, ladder: Ladder) -> tuple[BitPlan, Tensor]:
    """All plans of one width for a head's key channels, and what they take, ``[N]`` bits.

    A head without tokens has no channels, and the bits that a head takes anyway are counted for all. Left out
    are widths of values that a mix of their neighbours beats, at the cost of a token with its key.
    """
    levels: dict[int, list[int]] = {}  # widths of a token for each width of the channels
    for key in ladder.key_bits:
        cost = torch.tensor(
            [c + (b > 0) * key * ladder.head_dim for b, c in zip(ladder.value_bits, ladder.value_cost, strict=True)]
        )
        worthy = hull(thresholds(cost, torch.tensor(ladder.value_distortion, dtype=torch.float64)))
        levels[key] = [b for b, use in zip(ladder.value_bits, [True, *worthy.tolist()], strict=True) if use]
    head = [
        (values, key)
        for key in ladder.key_bits
        for values in itertools.product(levels[key], repeat=tokens)
        if any(values) or key == ladder.key_bits[0] == 0
    ]
    combined = list(itertools.product(head, repeat=heads))
    values = torch.tensor([[v for v, _ in plan] for plan in combined], dtype=torch.uint8)
    keys = torch.tensor([[k for _, k in plan] for plan in combined], dtype=torch.uint8)
    keys = keys.unsqueeze(2).expand(-1, -1, ladder.head_dim).contiguous()
    plans = BitPlan(values, keys, torch.zeros(values.shape, dtype=torch.bool))
    return plans, ladder.cost(plans).sum(1)


def lower_hull(cost: Tensor, loss: Tensor) -> list[tuple[int, float]]:
    """Corners of the lower convex hull of points, down to the least loss: cost rising, loss falling."""
    corners: list[tuple[int, float]] = []
    for x, y in sorted(zip(cost.tolist(), loss.tolist(), strict=True)):
        if corners and y >= corners[-1][1]:
            continue
        while len(corners) > 1:
            (x0, y0), (x1, y1) = corners[-2:]
            if (y0 - y1) * (x - x0) > (y0 - y) * (x1 - x0):
                break
            corners.pop()
        if corners and corners[-1][0] == x:
            corners.pop()
        corners.append((x, y))
    return corners


@pytest.mark.parametrize("ladder", [None, (0, 2, 16), (2, 4, 8, 16)])
@pytest.mark.parametrize(("heads", "tokens"), [(1, 3), (1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("scope", ["head", "layer"])
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    weight=st.sampled_from([0.1, 1.0, 10.0]),
    between=st.floats(0, 1),
)
def test_no_plan_is_better(
    ladder: tuple[int, ...] | None,
    heads: int,
    tokens: int,
    scope: str,
    seed: int,
    spread: float,
    weight: float,
    between: float,
) -> None:
    """Against every plan there is.

    Distortion over bits has a lower convex hull. A budget that is exactly a corner of it gets the corner's
    distortion, the least there is. A budget between two corners gets no more than the lower corner's, so that
    it loses at most what the bits beyond that corner are worth at the hull's slope.
    """
    heads = 1 if scope == "head" else heads
    problem = random_problem(1, heads, tokens, 32, group=32, spread=spread, seed=seed)
    options: dict[str, Any] = {"scope": scope, "key_weight": weight}
    whole = problem.ladder
    if ladder is not None:
        options["ladder"] = ladder
        whole = whole.restrict(ladder)
    plans, cost = every_plan(heads, tokens, whole)
    scores = Scores(problem.scores.token.expand(len(cost), -1, -1), problem.scores.channel.expand(len(cost), -1, -1))
    loss = distortion(Problem(scores, whole), plans, "layer", weight)
    corners = lower_hull(cost, loss)
    for (bits, corner), (next_bits, next_corner) in itertools.pairwise(corners):
        for more in (0, int(between * (next_bits - bits - 1))):
            budget = Budget(-(-(bits + more) // heads), heads)
            if budget.per_head >= problem.ladder.full_cost:
                continue  # nothing is compressed
            plan = make("waterfill", **options).allocate(problem.scores, problem.ladder, budget)
            assert overspent(problem, plan, budget, "layer") <= 0
            found = float(distortion(problem, plan, "layer", weight))
            assert found <= corner + 1e-12
            best = float(loss[cost <= budget.total].min())
            assert found >= best - 1e-12
            slope = (corner - next_corner) / (next_bits - bits)
            assert found - best <= slope * max(budget.total - bits, 0) + 1e-12
    assert len(corners) > 2


@pytest.mark.parametrize("ladder", [(0, 16), (0, 2), (0, 4, 8), (0, 2, 4, 8, 16), (16, 4, 0), (4, 8), (2,)])
@pytest.mark.parametrize("key_share", [None, 0.5])
@pytest.mark.parametrize("scope", SCOPES)
def test_ladder_restricts_the_widths(ladder: tuple[int, ...], key_share: float | None, scope: str) -> None:
    problem = random_problem(2, 2, 50, 64)
    plan = problem.allocate(0.6, ladder=ladder, key_share=key_share, scope=scope)
    assert set(plan.value_bits.unique().tolist()) <= set(ladder)
    assert set(plan.key_bits.unique().tolist()) <= set(ladder)
    assert bool(plan.kept.any(-1).all())
    assert overspent(problem, plan, problem.budget(0.6), scope) <= 0


@pytest.mark.parametrize("key_share", [None, 0.5])
def test_ladder_without_0_needs_room_for_every_token(key_share: float | None) -> None:
    problem = random_problem(1, 2, 50, 64)
    with pytest.raises(BudgetError, match=r"at least 4 bits a channel, .* bytes more than the budget"):
        problem.allocate(0.1, ladder=(4, 8), key_share=key_share)


def test_ladder_of_unknown_or_useless_widths() -> None:
    problem = random_problem()
    with pytest.raises(ConfigError, match="no width of 3 bits; it has 0, 2, 4, 6, 8, 16"):
        problem.allocate(0.5, ladder=(0, 3))
    with pytest.raises(ConfigError, match="ladder: it needs"):
        problem.allocate(0.5, ladder=())
    with pytest.raises(ConfigError, match="ladder: it needs a width above 0"):
        problem.allocate(0.5, ladder=(0,))


@pytest.mark.parametrize("scope", SCOPES)
def test_tokens_of_no_worth_still_fill_the_budget_beside_pinned_ones(scope: str) -> None:
    """As with a prompt no longer than its sinks, of which half the budget holds only some."""
    token = torch.zeros(1, 2, 4)
    problem = make_problem(token, torch.rand(1, 2, 64), torch.ones(1, 2, 4, dtype=torch.bool))
    plan = problem.allocate(0.9, scope=scope)
    assert bool((plan.pinned.sum(-1) == 1).all())
    assert bool(plan.kept.all())


@settings(max_examples=40, deadline=None)
@given(problem=problems(ties=False), share=st.floats(0.05, 0.95), scope=scopes)
def test_what_is_left_buys_no_upgrade(problem: Problem, share: float, scope: str) -> None:
    """Less than one token from nothing to everything, and the metadata of the channels of one head."""
    ladder = problem.ladder
    plan = problem.allocate(share, scope=scope)
    left = -overspent(problem, plan, problem.budget(share), scope)
    heads = 1 if scope == "head" else problem.scores.token.shape[1]
    token = ladder.value_cost[-1] + 16 * ladder.head_dim
    metadata = 32 * ladder.head_dim
    everything = bool((plan.value_bits == 16).all() and (plan.key_bits == 16).all())
    assert everything or left < token + metadata + (heads if not bool(plan.kept.any()) else 1) * (
        ladder.head_cost + token + metadata
    )


@pytest.mark.parametrize("key_share", [0.1, 0.3, 0.5])
@pytest.mark.parametrize(("ladder", "share"), [(None, 0.1), ((2, 4, 8, 16), 0.4)])
def test_key_share_splits_the_bits(key_share: float, ladder: tuple[int, ...] | None, share: float) -> None:
    if ladder is not None and key_share < 0.25:
        return  # 2 bits of every key are more
    problem = random_problem(1, 1, 2000, 64, group=1)
    plan = problem.allocate(share, key_share=key_share, ladder=ladder, scope="head")
    kept = int(plan.kept.sum())
    keys = kept * int(plan.key_bits.long().sum()) / int((problem.ladder.cost(plan) - problem.ladder.head_cost).sum())
    assert abs(keys - key_share) < 0.06


@pytest.mark.parametrize(("share", "at_most"), [(0.0248, 0.005), (0.05, 0.003), (0.1, 0.002)])
def test_blocks_waste_nothing(share: float, at_most: float) -> None:
    """Every head's boundaries are whole blocks, and less than a block or two of the budget is left."""
    problem = random_problem(1, 3, 6000, 64, group=16, block=16)
    plan = problem.allocate(share)
    left = -overspent(problem, plan, problem.budget(share), "layer")
    assert 0 <= left <= at_most * problem.budget(share).total
    for width in (2, 4, 8, 16):
        assert bool(((plan.value_bits >= width).sum(-1) % 16 == 0).all())


def test_a_few_blocks_a_layer() -> None:
    problem = random_problem(1, 8, 4000, 64, group=16, block=16, spread=4.0)
    ladder, kept = problem.ladder, []
    block = 16 * (ladder.value_cost[1] + 2 * ladder.head_dim) + 16 * ladder.head_dim
    for blocks in (0, 1, 4, 16):
        budget = Budget(ladder.head_cost + blocks * block // 8 + 1, 8)
        plan = make("waterfill").allocate(problem.scores, ladder, budget)
        assert overspent(problem, plan, budget, "layer") <= 0
        kept.append(int(plan.kept.sum()))
    assert kept[0] == 0
    assert 16 <= kept[1] <= kept[2] <= kept[3]


class Calls(TorchDispatchMode):
    """Counts the operations that reach a device; views reach none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and func.overloadpacket.__name__ != "_unsafe_view":
            self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_few_operations_and_none_that_waits_for_the_device() -> None:
    problem = random_problem(1, 8, 4096, 128, group=16, block=16)
    pinned = torch.arange(4096).expand(1, 8, 4096) < 4
    problem = Problem(Scores(problem.scores.token, problem.scores.channel, pinned), problem.ladder)
    problem.allocate(0.1)  # makes the tables of the ladder
    with Calls() as calls:
        problem.allocate(0.1)
    assert calls.names.total() <= 150
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_to_cpu"} & set(calls.names)
