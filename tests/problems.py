"""Problems for allocators to solve, and what their plans cost and lose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from rdkv.allocators.eviction import Eviction
from rdkv.allocators.quantization import Quantization
from rdkv.allocators.waterfill import Waterfill, WaterfillOptions
from rdkv.plugins.rdkv.format import MixedBit, MixedBitOptions
from rdkv.runtime.interfaces import Allocator
from rdkv.runtime.ladder import Ladder
from rdkv.runtime.plan import BitPlan, Budget, Scores

quick = settings(max_examples=30, deadline=None)


SCOPES = ["head", "layer", "model"]


MAKERS: dict[str, type[Allocator]] = {"waterfill": Waterfill, "eviction": Eviction, "quantization": Quantization}


def lookup(bits: Tensor, levels: tuple[int, ...], table: tuple[float, ...] | tuple[int, ...]) -> Tensor:
    """``table`` at the level of each width in ``bits`` (uint8, any shape), int64 or float64; 0 at other widths."""
    dtype = torch.int64 if all(isinstance(x, int) for x in table) else torch.float64
    full = torch.zeros(256, dtype=dtype)
    full[list(levels)] = torch.tensor(table, dtype=dtype)
    return full[bits.int()]


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
    token: Tensor, channel: Tensor, pinned: Tensor | None = None, group: int = 4, block: int = 1
) -> Problem:
    """On the ladder of ``mixed-bit``, with tokens in blocks of ``block``."""
    ladder = MixedBit(MixedBitOptions(channel_group=group)).ladder(channel.shape[-1], token.shape[-1])
    if block == 1:  # a plain format: no blocks, and a scale and zero for each quantised channel
        ladder = replace(ladder, token_block=1, key_block=1, key_overhead=(16, 32, 32, 32, 32, 0), head_cost=512)
    return Problem(Scores(token, channel, pinned), ladder)


def random_problem(
    batch: int = 1,
    heads: int = 2,
    tokens: int = 30,
    dim: int = 32,
    group: int = 4,
    spread: float = 2.0,
    seed: int = 0,
    block: int = 1,
) -> Problem:
    """Log-normal scores, all of them different."""
    generator = torch.Generator().manual_seed(seed)
    token = (spread * torch.randn(batch, heads, tokens, generator=generator)).exp()
    channel = (spread * torch.randn(batch, heads, dim, generator=generator)).exp()
    return make_problem(token, channel, group=group, block=block)


@st.composite
def problems(draw: st.DrawFn, ties: bool = True, pins: bool = False, block: int = 1) -> Problem:
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
    return make_problem(token, channel, pinned, group, block)


shares = st.one_of(st.floats(0.001, 0.1), st.floats(0.1, 1.0))


scopes = st.sampled_from(SCOPES)


KEY_WEIGHT = WaterfillOptions().key_weight


def distortion(problem: Problem, plan: BitPlan, scope: str, key_weight: float = KEY_WEIGHT) -> Tensor:
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


def uniform(problem: Problem, bits: int) -> BitPlan:
    token, channel = problem.scores.token, problem.scores.channel
    return BitPlan(
        torch.full(token.shape, bits, dtype=torch.uint8),
        torch.full(channel.shape, bits, dtype=torch.uint8),
        torch.zeros(token.shape, dtype=torch.bool),
    )


def same(a: BitPlan, b: BitPlan) -> bool:
    return (
        torch.equal(a.value_bits, b.value_bits)
        and torch.equal(a.key_bits, b.key_bits)
        and torch.equal(a.pinned, b.pinned)
    )
