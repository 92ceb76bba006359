"""What every allocator starts with: heads that compete put side by side, pinned tokens paid for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from ..runtime.interfaces import PluginOptions, Scope
from ..runtime.ladder import Ladder
from ..runtime.plan import BitPlan, Budget, Scores


class ScopeOptions(PluginOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The option that every allocator has."""

    scope: Annotated[
        Scope, msgspec.Meta(description="which heads compete for bytes: none, those of a layer, or of the model")
    ] = "layer"


@dataclass(frozen=True)
class Problem:
    """``P`` independent problems of ``h`` competing heads each, and the bits left for their tokens.

    Attributes:
        token: ``[P, h, T]`` float64, sums to 1 over a problem; 0 for pinned tokens.
        free: ``[P, h, T]`` bool, tokens that are not pinned.
        channel: ``[P, h, D]`` float64, sums to 1 over a problem.
        available: ``[P]`` int64, bits for tokens and channels once heads and pinned tokens are paid.
        shape: ``(B, H)`` of the plan to return.
    """

    token: Tensor
    free: Tensor
    channel: Tensor
    available: Tensor
    shape: tuple[int, int]

    def plan(self, value_bits: Tensor, key_bits: Tensor) -> BitPlan:
        """A plan from bits ``[P, h, T]`` and ``[P, h, D]``; heads without coded tokens hold no channels."""
        value_bits = value_bits.masked_fill(~self.free, 0)
        key_bits = key_bits.masked_fill(~(value_bits > 0).any(-1, keepdim=True), 0)
        value_bits = value_bits.masked_fill(~self.free, 16)
        tokens, dim = value_bits.shape[-1], key_bits.shape[-1]
        return BitPlan(
            value_bits.reshape(*self.shape, tokens).to(torch.uint8),
            key_bits.reshape(*self.shape, dim).to(torch.uint8),
            ~self.free.reshape(*self.shape, tokens),
        )


def uniform_plan(scores: Scores, bits: int) -> BitPlan:
    """Every token and channel at ``bits``, nothing pinned."""
    batch, heads, tokens = scores.token.shape
    return BitPlan.uniform((batch, heads, tokens, scores.channel.shape[-1]), bits, scores.token.device)


def pose(scores: Scores, ladder: Ladder, budget: Budget, scope: Scope) -> Problem | BitPlan:
    """The problem to solve, or the plan where there is nothing to choose (all fits, or nothing does)."""
    batch, heads, tokens = scores.token.shape
    if budget.per_head >= ladder.full_cost:
        return uniform_plan(scores, 16)
    rows = (batch * heads, 1) if scope == "head" else (batch, heads)
    available = budget.per_head * rows[1] - ladder.head_cost * rows[1]
    if available <= 0:
        return uniform_plan(scores, 0)
    pinned = torch.zeros_like(scores.token, dtype=torch.bool) if scores.pinned is None else scores.pinned
    affordable = available // (2 * rows[1] * ladder.pinned_cost)  # a head; half is left for the rest
    pinned = (pinned & (pinned.cumsum(-1) <= affordable)).reshape(*rows, tokens)
    token = scores.token.double().reshape(*rows, tokens).masked_fill(pinned, 0.0)
    # Tokens that are all worth nothing are worth the same, so that they still fill the budget.
    token = torch.where((token > 0).any(2, keepdim=True).any(1, keepdim=True), token, (~pinned).double())
    channel = scores.channel.double().reshape(*rows, -1)
    return Problem(
        token=_normalise(token),
        free=~pinned,
        channel=_normalise(channel),
        available=available - pinned.sum((1, 2)) * ladder.pinned_cost,
        shape=(batch, heads),
    )


def _normalise(weights: Tensor) -> Tensor:
    """Divide by the sum over a problem, so that only ratios count; all zeros stay zeros."""
    total = weights.sum((1, 2), keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)
