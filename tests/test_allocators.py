"""Laws of all allocators: the budget holds, more of it never hurts, and only ratios of scores count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from problems import (
    MAKERS,
    SCOPES,
    Problem,
    distortion,
    make,
    make_problem,
    overspent,
    problems,
    quick,
    random_problem,
    same,
    scopes,
    shares,
)

from rdkv.plugins.rdkv.format import MixedBit
from rdkv.runtime.errors import BudgetError
from rdkv.runtime.plan import BitPlan, Budget, Scores


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(problems(pins=True), problems(pins=True, block=16)),
    shares,
    scopes,
    st.sampled_from([None, 0.01, 0.5, 0.99]),
    st.sampled_from(list(MAKERS)),
)
def test_budget_is_never_exceeded(
    problem: Problem, share: float, scope: str, key_share: float | None, name: str
) -> None:
    budget = problem.budget(share)
    options = {"key_share": key_share} if name == "waterfill" else {}
    try:
        plan = make(name, scope=scope, **options).allocate(problem.scores, problem.ladder, budget)
    except BudgetError:
        assert name == "quantization"
        return
    assert plan.value_bits.dtype == plan.key_bits.dtype == torch.uint8
    assert plan.pinned.dtype == torch.bool
    assert plan.value_bits.shape == plan.pinned.shape == problem.scores.token.shape
    assert plan.key_bits.shape == problem.scores.channel.shape
    assert set(plan.value_bits.unique().tolist()) <= set(problem.ladder.value_bits)
    assert set(plan.key_bits.unique().tolist()) <= set(problem.ladder.key_bits)
    assert overspent(problem, plan, budget, scope) <= 0
    if problem.ladder.token_block == 1:
        return
    batch, heads, tokens = problem.scores.token.shape
    keys, values = torch.randn(2, batch, heads, tokens, plan.key_bits.shape[-1]).bfloat16()
    for b in range(batch):  # as packed, not as promised
        row = BitPlan(plan.value_bits[b : b + 1], plan.key_bits[b : b + 1], plan.pinned[b : b + 1])
        assert MixedBit().pack(keys[b : b + 1], values[b : b + 1], row).nbytes * 8 <= budget.total


@pytest.mark.parametrize("name", ["waterfill", "eviction", "quantization"])
@pytest.mark.parametrize("scope", ["head", "layer"])
@settings(max_examples=25, deadline=None)
@given(
    problem=st.one_of(problems(), problems(block=16)),
    given_shares=st.lists(shares, min_size=2, max_size=8),
    weight=st.sampled_from([0.1, 1, 10]),
)
def test_more_budget_never_raises_the_distortion(
    name: str, scope: str, problem: Problem, given_shares: list[float], weight: float
) -> None:
    options = {"key_weight": weight} if name == "waterfill" else {}
    lost = None
    for share in sorted(given_shares):
        try:
            plan = problem.allocate(share, name, scope=scope, **options)
        except BudgetError:
            assert lost is None  # what fits a budget fits a larger one
            continue
        loses = distortion(problem, plan, scope, weight if name == "waterfill" else 1.0)
        assert lost is None or bool((loses <= lost * (1 + 1e-9) + 1e-15).all())
        lost = loses


LAWFUL: list[tuple[str, dict[str, Any], float]] = [
    ("waterfill", {}, 0.05),
    ("waterfill", {"key_share": 0.5}, 0.05),
    ("eviction", {}, 0.1),
    ("quantization", {}, 0.4),
]


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize(("name", "options", "share"), LAWFUL)
@pytest.mark.parametrize("scope", SCOPES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), powers=st.tuples(st.integers(-60, 60), st.integers(-60, 60)))
def test_scale_of_scores_does_not_matter(
    name: str, options: dict[str, Any], share: float, scope: str, seed: int, powers: tuple[int, int], block: int
) -> None:
    problem = random_problem(2, 2, 60 if block == 1 else 600, 64, spread=1.0, seed=seed, block=block)
    plan = problem.allocate(share, name, scope=scope, **options)
    assert bool(plan.kept.any())
    for token, channel in (2.0 ** powers[0], 2.0 ** powers[1]), (3.7e-7, 123.4):
        scores = Scores(problem.scores.token * token, problem.scores.channel * channel)
        assert same(Problem(scores, problem.ladder).allocate(share, name, scope=scope, **options), plan)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize(("name", "options", "share"), LAWFUL)
@pytest.mark.parametrize("scope", SCOPES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_order_of_tokens_and_channels_does_not_matter(
    name: str, options: dict[str, Any], share: float, scope: str, seed: int, block: int
) -> None:
    problem = random_problem(2, 2, 60 if block == 1 else 600, 64, spread=1.0, seed=seed, block=block)
    token, channel = problem.scores.token, problem.scores.channel
    assume(token.unique().numel() == token.numel())
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.rand(token.shape, generator=generator).argsort(-1)  # an order of its own for each head
    channels = torch.rand(channel.shape, generator=generator).argsort(-1)
    plan = problem.allocate(share, name, scope=scope, **options)
    shuffled = Problem(Scores(token.gather(-1, tokens), channel.gather(-1, channels)), problem.ladder)
    expected = BitPlan(plan.value_bits.gather(-1, tokens), plan.key_bits.gather(-1, channels), plan.pinned)
    assert same(shuffled.allocate(share, name, scope=scope, **options), expected)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize(("name", "options", "share"), LAWFUL)
@pytest.mark.parametrize("scope", SCOPES)
def test_sequences_are_independent(name: str, options: dict[str, Any], share: float, scope: str, block: int) -> None:
    problem = random_problem(3, 2, 40 if block == 1 else 600, 64, block=block)
    plan = problem.allocate(share, name, scope=scope, **options)
    for b in range(3):
        row = Scores(problem.scores.token[b : b + 1], problem.scores.channel[b : b + 1])
        alone = Problem(row, problem.ladder).allocate(share, name, scope=scope, **options)
        assert same(alone, BitPlan(plan.value_bits[b : b + 1], plan.key_bits[b : b + 1], plan.pinned[b : b + 1]))


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize(("name", "options", "share"), LAWFUL)
def test_heads_of_scope_head_are_independent_and_others_compete(
    name: str, options: dict[str, Any], share: float, block: int
) -> None:
    problem = random_problem(1, 2, 40 if block == 1 else 600, 64, block=block)
    token = problem.scores.token * torch.tensor([1.0, 1000.0])[:, None]
    channel = problem.scores.channel * torch.tensor([1.0, 1000.0])[:, None]
    scaled = Problem(Scores(token, channel), problem.ladder)
    plan = problem.allocate(share, name, scope="head", **options)
    assert same(scaled.allocate(share, name, scope="head", **options), plan)
    layer = scaled.allocate(share, name, scope="layer", **options)
    spent = problem.ladder.cost(layer)[0]
    assert spent[1] > spent[0]
    assert same(scaled.allocate(share, name, scope="model", **options), layer)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("name", ["waterfill", "eviction"])
@pytest.mark.parametrize("scope", SCOPES)
@quick
@given(
    tokens=st.integers(1, 40),
    asked=st.sets(st.integers(0, 39), min_size=1, max_size=20),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_pinned_tokens_stay_as_far_as_half_the_budget(
    name: str, scope: str, tokens: int, asked: set[int], share: float, seed: int, block: int
) -> None:
    plain = random_problem(1, 2, tokens, 32, seed=seed, block=block)
    pinned = torch.zeros(1, 2, tokens, dtype=torch.bool)
    pinned[:, 1, [t for t in asked if t < tokens]] = True
    scores = Scores(plain.scores.token, plain.scores.channel, pinned)
    problem, budget = Problem(scores, plain.ladder), plain.budget(share)
    plan = problem.allocate(share, name, scope=scope)
    assert overspent(problem, plan, budget, scope) <= 0
    room = max(budget.per_head - plain.ladder.head_cost, 0) // 2
    expected = pinned & (pinned.cumsum(-1) * plain.ladder.pinned_cost <= room)  # the first ones
    assert torch.equal(plan.pinned, expected)
    assert bool((plan.value_bits[plan.pinned] == 16).all())


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("name", ["waterfill", "eviction"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("token", [0.0, 0.7])
@pytest.mark.parametrize("channel", [0.0, 0.7, None])
def test_equal_scores_fill_the_budget(
    name: str, scope: str, share: float, token: float, channel: float | None, block: int
) -> None:
    heads, tokens, dim = 2, 60, 64
    weights = random_problem(1, heads, tokens, dim, block=block).scores.channel
    weights = weights if channel is None else torch.full_like(weights, channel)
    problem = make_problem(torch.full((1, heads, tokens), token), weights, block=block)
    plan = problem.allocate(share, name, scope=scope)
    left = -overspent(problem, plan, problem.budget(share), scope)
    largest = block * (problem.ladder.value_cost[-1] + 16 * dim)  # one token, or block, from nothing to everything
    assert left >= 0
    assert left < largest or bool((plan.value_bits == 16).all())


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("name", ["waterfill", "eviction"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("key_share", [None, 0.5])
def test_budget_below_one_token_gives_an_empty_plan(name: str, scope: str, key_share: float | None, block: int) -> None:
    problem = random_problem(2, 2, 30, 64, block=block)
    options = {"key_share": key_share} if name == "waterfill" else {}
    ladder = problem.ladder
    for bits in (0, 1, ladder.head_cost, ladder.head_cost + 1, ladder.head_cost + 64):
        plan = make(name, scope=scope, **options).allocate(problem.scores, ladder, Budget(bits, 2))
        assert not bool(plan.kept.any())
        assert not bool(plan.key_bits.any())
        assert int(ladder.cost(plan).sum()) == 0


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("scope", SCOPES)
def test_full_budget_keeps_everything(name: str, scope: str, block: int) -> None:
    problem = random_problem(2, 2, 30, 64, block=block)
    pinned = torch.arange(30).expand(2, 2, 30) < 4
    problem = Problem(Scores(problem.scores.token, problem.scores.channel, pinned), problem.ladder)
    plan = problem.allocate(1.0, name, scope=scope)
    assert plan.is_identity
    assert not bool(plan.pinned.any())


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("name", ["waterfill", "eviction"])
@pytest.mark.parametrize("scope", SCOPES)
@quick
@given(share=st.floats(0.001, 1.0), seed=st.integers(0, 2**31), weight=st.sampled_from([0.0, 1e-30, 1.0, 1e30]))
@example(share=1.0, seed=0, weight=0.0)
def test_one_token(name: str, scope: str, share: float, seed: int, weight: float, block: int) -> None:
    random = random_problem(1, 2, 1, 64, seed=seed, block=block)
    problem = make_problem(torch.full((1, 2, 1), weight), random.scores.channel, block=block)
    plan = problem.allocate(share, name, scope=scope)
    assert overspent(problem, plan, problem.budget(share), scope) <= 0
