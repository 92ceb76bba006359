"""Laws of the allocators: the budget holds, more of it never hurts, and nothing fitting is better."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdkv.allocators import waterfill
from rdkv.allocators.eviction import Eviction
from rdkv.allocators.fill import fill
from rdkv.allocators.keypath import key_path
from rdkv.allocators.levels import hull, thresholds
from rdkv.allocators.quantization import Quantization
from rdkv.allocators.waterfill import Waterfill
from rdkv.allocators.waterlevel import key_points
from rdkv.plugins.rdkv.format import MixedBit, MixedBitOptions
from rdkv.runtime.errors import BudgetError, ConfigError
from rdkv.runtime.interfaces import Allocator
from rdkv.runtime.ladder import Ladder, lookup
from rdkv.runtime.plan import BitPlan, Budget, Scores

quick = settings(max_examples=30, deadline=None)
SCOPES = ["head", "layer", "model"]
MAKERS: dict[str, type[Allocator]] = {"waterfill": Waterfill, "eviction": Eviction, "quantization": Quantization}


def make(name: str, **options: Any) -> Allocator:
    maker = MAKERS[name]
    return maker(maker.Options(**options))


@dataclass(frozen=True)
class Problem:
    """Scores, and the ladder of the cache format for them."""

    scores: Scores
    ladder: Ladder

    def budget(self, share: float) -> Budget:
        """``share`` of the full cache, as the runtime gives it."""
        return Budget(int(share * self.ladder.full_cost), self.scores.token.shape[1])

    def allocate(self, share: float, name: str = "waterfill", **options: Any) -> BitPlan:
        return make(name, **options).allocate(self.scores, self.ladder, self.budget(share))


def make_problem(
    token: Tensor, channel: Tensor, pinned: Tensor | None = None, group: int = 4, positions: bool = True
) -> Problem:
    format_ = MixedBit(MixedBitOptions(channel_group=group, positions=positions))
    return Problem(Scores(token, channel, pinned), format_.ladder(channel.shape[-1], token.shape[-1]))


def random_problem(
    batch: int = 1, heads: int = 2, tokens: int = 30, dim: int = 32, group: int = 4, spread: float = 2.0, seed: int = 0
) -> Problem:
    """Log-normal scores, all of them different."""
    generator = torch.Generator().manual_seed(seed)
    token = (spread * torch.randn(batch, heads, tokens, generator=generator)).exp()
    channel = (spread * torch.randn(batch, heads, dim, generator=generator)).exp()
    return make_problem(token, channel, group=group)


@st.composite
def problems(draw: st.DrawFn, ties: bool = True, pins: bool = False) -> Problem:
    """Scores from flat to very uneven, some with many ties and zeros."""
    batch, heads, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    dim, group = draw(st.sampled_from([32, 80])), draw(st.sampled_from([4, 12, 256]))
    spread, seed = draw(st.sampled_from([0.1, 2.0, 6.0])), draw(st.integers(0, 2**31))
    problem = random_problem(batch, heads, tokens, dim, group, spread, seed)
    token, channel = problem.scores.token, problem.scores.channel
    if ties and draw(st.booleans()):
        token, channel = token.log2().round().exp2(), channel.log2().round().exp2()
        token, channel = token.where(token > 1, 0.0), channel.where(channel > 0.5, 0.0)
    pinned = torch.arange(tokens).expand(token.shape) < draw(st.integers(0, 6)) if pins else None
    return make_problem(token, channel, pinned, group)


shares = st.one_of(st.floats(0.001, 0.1), st.floats(0.1, 1.0))
scopes = st.sampled_from(SCOPES)


def distortion(problem: Problem, plan: BitPlan, scope: str, key_weight: float = 1.0) -> Tensor:
    """What a plan loses, as ``Waterfill`` says: one number a head for scope ``head``, else one a sequence."""
    ladder, over = problem.ladder, -1 if scope == "head" else (1, 2)
    token, channel = problem.scores.token.double(), problem.scores.channel.double()
    # Tokens that are all worth nothing are worth the same; such channels count for nothing.
    token = token.where(token.sum(over, keepdim=True) > 0, 1.0)
    total = torch.zeros(())
    for weight, worth, bits, levels, eps in (
        (1.0, token, plan.value_bits, ladder.value_bits, ladder.value_distortion),
        (key_weight, channel, plan.key_bits, ladder.key_bits, ladder.key_distortion),
    ):
        whole = worth.sum(over)
        loss = (worth * lookup(bits, levels, eps)).sum(over)
        total = total + weight * loss / whole.where(whole > 0, 1.0)
    return total


def overspent(problem: Problem, plan: BitPlan, budget: Budget, scope: str) -> int:
    """Bits beyond the budget, negative if some are left."""
    cost = problem.ladder.cost(plan)
    left = cost - budget.per_head if scope == "head" else cost.sum(1) - budget.total
    return int(left.max())


@settings(max_examples=60, deadline=None)
@given(problems(pins=True), shares, scopes, st.sampled_from([None, 0.01, 0.5, 0.99]), st.sampled_from(list(MAKERS)))
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
    batch, heads, tokens = problem.scores.token.shape
    keys, values = torch.randn(2, batch, heads, tokens, plan.key_bits.shape[-1]).bfloat16()
    for b in range(batch):  # as packed, not as promised
        row = BitPlan(plan.value_bits[b : b + 1], plan.key_bits[b : b + 1], plan.pinned[b : b + 1])
        assert MixedBit().pack(keys[b : b + 1], values[b : b + 1], row).nbytes * 8 <= budget.total


@pytest.mark.parametrize("name", ["waterfill", "eviction", "quantization"])
@pytest.mark.parametrize("scope", ["head", "layer"])
@settings(max_examples=25, deadline=None)
@given(problem=problems(), given_shares=st.lists(shares, min_size=2, max_size=8), weight=st.sampled_from([0.1, 1, 10]))
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


@pytest.mark.parametrize(
    ("seed", "tokens", "spread", "share"), [(286, 8, 4.0, 0.13), (620, 20, 4.0, 0.06), (0, 8, 1.0, 0.3)]
)
def test_the_better_of_two_choices_of_key_widths(
    seed: int, tokens: int, spread: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = random_problem(1, 2, tokens, spread=spread, seed=seed)
    lost = float(distortion(problem, problem.allocate(share, scope="layer"), "layer"))
    alone = []
    for pick in (0, 1):
        monkeypatch.setattr(waterfill, "key_points", lambda *given, pick=pick: key_points(*given)[pick : pick + 1])
        alone.append(float(distortion(problem, problem.allocate(share, scope="layer"), "layer")))
    assert lost == min(alone)


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


@quick
@given(problem=problems())
def test_key_path_rises_by_gain_per_bit(problem: Problem) -> None:
    ladder, channel = problem.ladder, problem.scores.channel.double()
    path = key_path(channel, ladder)
    gain, bits = -path.loss.diff(dim=-1), path.bits.diff(dim=-1)
    assert bool((bits > 0).all())
    rate = gain / bits
    assert bool((rate.diff(dim=-1) <= 1e-9 * rate[..., :-1] + 1e-15).all())
    points = path.bits.shape[-1]
    for point in (0, 1, points // 2, points - 1):
        widths = path.widths(torch.full(channel.shape[:2], point), ladder.key_bits)
        assert torch.equal(lookup(widths, ladder.key_bits, ladder.key_cost).sum(-1), path.bits[..., point])
        assert torch.equal(lookup(widths, ladder.key_bits, ladder.key_overhead).sum(-1), path.overhead[..., point])
        lost = (channel * lookup(widths, ladder.key_bits, ladder.key_distortion)).sum(-1)
        torch.testing.assert_close(path.loss[..., point], lost)
        ordered = widths.gather(-1, channel.argsort(dim=-1, descending=True, stable=True)).int()
        assert bool((ordered.diff(dim=-1) <= 0).all())  # the more a channel weighs, the wider
        for start in range(0, ladder.head_dim, ladder.channel_group):
            part = ordered[..., start : start + ladder.channel_group]
            assert bool((part == part[..., :1]).all())


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


def same(a: BitPlan, b: BitPlan) -> bool:
    return (
        torch.equal(a.value_bits, b.value_bits)
        and torch.equal(a.key_bits, b.key_bits)
        and torch.equal(a.pinned, b.pinned)
    )


LAWFUL: list[tuple[str, dict[str, Any], float]] = [
    ("waterfill", {}, 0.05),
    ("waterfill", {"key_share": 0.5}, 0.05),
    ("eviction", {}, 0.1),
    ("quantization", {}, 0.4),
]


@pytest.mark.parametrize(("name", "options", "share"), LAWFUL)
@pytest.mark.parametrize("scope", SCOPES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), powers=st.tuples(st.integers(-60, 60), st.integers(-60, 60)))
def test_scale_of_scores_does_not_matter(
    name: str, options: dict[str, Any], share: float, scope: str, seed: int, powers: tuple[int, int]
) -> None:
    problem = random_problem(2, 2, 60, 64, spread=1.0, seed=seed)
    plan = problem.allocate(share, name, scope=scope, **options)
    assert bool(plan.kept.any())
    for token, channel in (2.0 ** powers[0], 2.0 ** powers[1]), (3.7e-7, 123.4):
        scores = Scores(problem.scores.token * token, problem.scores.channel * channel)
        assert same(Problem(scores, problem.ladder).allocate(share, name, scope=scope, **options), plan)


@pytest.mark.parametrize(("name", "options", "share"), LAWFUL)
@pytest.mark.parametrize("scope", SCOPES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_order_of_tokens_and_channels_does_not_matter(
    name: str, options: dict[str, Any], share: float, scope: str, seed: int
) -> None:
    problem = random_problem(2, 2, 60, 64, spread=1.0, seed=seed)
    token, channel = problem.scores.token, problem.scores.channel
    assume(token.unique().numel() == token.numel())
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.rand(token.shape, generator=generator).argsort(-1)  # an order of its own for each head
    channels = torch.rand(channel.shape, generator=generator).argsort(-1)
    plan = problem.allocate(share, name, scope=scope, **options)
    shuffled = Problem(Scores(token.gather(-1, tokens), channel.gather(-1, channels)), problem.ladder)
    expected = BitPlan(plan.value_bits.gather(-1, tokens), plan.key_bits.gather(-1, channels), plan.pinned)
    assert same(shuffled.allocate(share, name, scope=scope, **options), expected)


@pytest.mark.parametrize(("name", "options", "share"), LAWFUL)
@pytest.mark.parametrize("scope", SCOPES)
def test_sequences_are_independent(name: str, options: dict[str, Any], share: float, scope: str) -> None:
    problem = random_problem(3, 2, 40, 64)
    plan = problem.allocate(share, name, scope=scope, **options)
    for b in range(3):
        row = Scores(problem.scores.token[b : b + 1], problem.scores.channel[b : b + 1])
        alone = Problem(row, problem.ladder).allocate(share, name, scope=scope, **options)
        assert same(alone, BitPlan(plan.value_bits[b : b + 1], plan.key_bits[b : b + 1], plan.pinned[b : b + 1]))


@pytest.mark.parametrize(("name", "options", "share"), LAWFUL)
def test_heads_of_scope_head_are_independent_and_others_compete(
    name: str, options: dict[str, Any], share: float
) -> None:
    problem = random_problem(1, 2, 40, 64)
    token = problem.scores.token * torch.tensor([1.0, 1000.0])[:, None]
    channel = problem.scores.channel * torch.tensor([1.0, 1000.0])[:, None]
    scaled = Problem(Scores(token, channel), problem.ladder)
    plan = problem.allocate(share, name, scope="head", **options)
    assert same(scaled.allocate(share, name, scope="head", **options), plan)
    layer = scaled.allocate(share, name, scope="layer", **options)
    spent = problem.ladder.cost(layer)[0]
    assert spent[1] > spent[0]
    assert same(scaled.allocate(share, name, scope="model", **options), layer)


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


@pytest.mark.parametrize("mode", ["mixed", "uniform"])
@pytest.mark.parametrize("scope", SCOPES)
@quick
@given(problem=problems(pins=True), share=st.floats(0.1, 1.2))
def test_quantization_evicts_nothing(mode: str, scope: str, problem: Problem, share: float) -> None:
    share = min(share, 1.0)
    tokens, ladder, budget = problem.scores.token.shape[-1], problem.ladder, problem.budget(share)
    dim = ladder.head_dim
    costs = {  # of one head, everything at one width
        b: tokens * (ladder.value_cost[i] + dim * b) + dim * ladder.key_overhead[i] + ladder.head_cost
        for i, b in enumerate(ladder.value_bits)
        if b > 0
    }
    costs[16] = ladder.full_cost
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


def test_quantization_fits_what_it_says_is_the_least() -> None:
    problem = random_problem(tokens=300, dim=64)
    ladder = problem.ladder
    least = 300 * (ladder.value_cost[1] + 128) + 64 * 32 + ladder.head_cost
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


def uniform(problem: Problem, bits: int) -> BitPlan:
    token, channel = problem.scores.token, problem.scores.channel
    return BitPlan(
        torch.full(token.shape, bits, dtype=torch.uint8),
        torch.full(channel.shape, bits, dtype=torch.uint8),
        torch.zeros(token.shape, dtype=torch.bool),
    )


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
    with pytest.raises(ConfigError, match="no width of 3 bits; it has 0, 2, 4, 8, 16"):
        problem.allocate(0.5, ladder=(0, 3))
    with pytest.raises(ConfigError, match="ladder: it needs"):
        problem.allocate(0.5, ladder=())
    with pytest.raises(ConfigError, match="ladder: it needs a width above 0"):
        problem.allocate(0.5, ladder=(0,))


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
    name: str, scope: str, tokens: int, asked: set[int], share: float, seed: int
) -> None:
    plain = random_problem(1, 2, tokens, 32, seed=seed)
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


def test_quantization_pins_nothing() -> None:
    problem = random_problem(tokens=50)
    pinned = torch.arange(50).expand(1, 2, 50) < 4
    plan = Problem(Scores(problem.scores.token, problem.scores.channel, pinned), problem.ladder)
    assert not bool(plan.allocate(0.3, "quantization").pinned.any())


@pytest.mark.parametrize("name", ["waterfill", "eviction"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("token", [0.0, 0.7])
@pytest.mark.parametrize("channel", [0.0, 0.7, None])
def test_equal_scores_fill_the_budget(name: str, scope: str, share: float, token: float, channel: float | None) -> None:
    heads, tokens, dim = 2, 60, 64
    weights = random_problem(1, heads, tokens, dim).scores.channel
    weights = weights if channel is None else torch.full_like(weights, channel)
    problem = make_problem(torch.full((1, heads, tokens), token), weights)
    plan = problem.allocate(share, name, scope=scope)
    left = -overspent(problem, plan, problem.budget(share), scope)
    largest = problem.ladder.value_cost[-1] + 16 * dim  # one token from nothing to everything
    assert left >= 0
    assert left < largest or bool((plan.value_bits == 16).all())


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


@pytest.mark.parametrize("name", ["waterfill", "eviction"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("key_share", [None, 0.5])
def test_budget_below_one_token_gives_an_empty_plan(name: str, scope: str, key_share: float | None) -> None:
    problem = random_problem(2, 2, 30, 64)
    options = {"key_share": key_share} if name == "waterfill" else {}
    ladder = problem.ladder
    for bits in (0, 1, ladder.head_cost, ladder.head_cost + 1, ladder.head_cost + 64):
        plan = make(name, scope=scope, **options).allocate(problem.scores, ladder, Budget(bits, 2))
        assert not bool(plan.kept.any())
        assert not bool(plan.key_bits.any())
        assert int(ladder.cost(plan).sum()) == 0


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("scope", SCOPES)
def test_full_budget_keeps_everything(name: str, scope: str) -> None:
    problem = random_problem(2, 2, 30, 64)
    pinned = torch.arange(30).expand(2, 2, 30) < 4
    problem = Problem(Scores(problem.scores.token, problem.scores.channel, pinned), problem.ladder)
    plan = problem.allocate(1.0, name, scope=scope)
    assert plan.is_identity
    assert not bool(plan.pinned.any())


@pytest.mark.parametrize("name", ["waterfill", "eviction"])
@pytest.mark.parametrize("scope", SCOPES)
@quick
@given(share=st.floats(0.001, 1.0), seed=st.integers(0, 2**31), weight=st.sampled_from([0.0, 1e-30, 1.0, 1e30]))
@example(1.0, 0, 0.0)
def test_one_token(name: str, scope: str, share: float, seed: int, weight: float) -> None:
    random = random_problem(1, 2, 1, 64, seed=seed)
    problem = make_problem(torch.full((1, 2, 1), weight), random.scores.channel)
    plan = problem.allocate(share, name, scope=scope)
    assert overspent(problem, plan, problem.budget(share), scope) <= 0


@pytest.mark.parametrize("key_share", [0.1, 0.3, 0.5])
@pytest.mark.parametrize(("ladder", "share"), [(None, 0.1), ((2, 4, 8, 16), 0.4)])
def test_key_share_splits_the_bits(key_share: float, ladder: tuple[int, ...] | None, share: float) -> None:
    if ladder is not None and key_share < 0.25:
        return  # 2 bits of every key are more
    problem = random_problem(1, 1, 2000, 64, group=1)
    plan = problem.allocate(share, key_share=key_share, ladder=ladder, scope="head")
    kept = int(plan.kept.sum())
    keys = kept * int(plan.key_bits.long().sum()) / int(problem.ladder.cost(plan).sum())
    assert abs(keys - key_share) < 0.06


@quick
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=5),
    st.lists(st.integers(1, 1000), min_size=5, max_size=5),
    st.floats(-9, 9),
)
def test_thresholds_are_those_of_the_lagrangian(rises: list[int], drops: list[int], power: float) -> None:
    cost = torch.tensor([0, *rises]).cumsum(0)
    distortion_ = torch.tensor([0, *drops[: len(rises)]]).flip(0).cumsum(0).flip(0).double()
    distortion_ = torch.cat([distortion_[1:].flip(0).cumsum(0).flip(0), torch.zeros(1)])
    assume(bool((distortion_.diff() < 0).all()))
    bar = thresholds(cost, distortion_)
    assert bool((bar.diff() >= 0).all())
    weight = 10.0**power
    lagrangian = weight * distortion_ + cost
    level = int((weight >= bar).sum())
    assert float(lagrangian[level]) <= float(lagrangian.min()) * (1 + 1e-12)
    on_hull = hull(bar)
    assert level == 0 or bool(on_hull[level - 1])
