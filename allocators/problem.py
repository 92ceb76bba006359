"""What every allocator starts with: heads that compete put side by side, pinned tokens paid for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from ..kernels.available import kernels_for
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
        token: ``[P, h, T]`` float32, -1 for pinned tokens.
        channel: ``[P, h, D]`` float32.
        pinned: ``[P, h, T]`` bool, or None if no token is.
        available: ``[P, 1]`` float64, bits for tokens and channels once heads and pinned tokens are paid.
        shape: ``(B, H)`` of the plan to return.
    """

    token: Tensor
    channel: Tensor
    pinned: Tensor | None
    available: Tensor
    shape: tuple[int, int]

    def plan(self, value_bits: Tensor, key_bits: Tensor) -> BitPlan:
        """A plan from bits ``[P, h, T]`` and ``[P, h, D]``, uint8."""
        if self.pinned is not None:
            value_bits = value_bits.masked_fill(self.pinned, 16)
        value_bits = value_bits.view(*self.shape, -1)
        pinned = torch.zeros_like(value_bits, dtype=torch.bool) if self.pinned is None else self.pinned
        return BitPlan(value_bits, key_bits.view(*self.shape, -1), pinned.view(value_bits.shape))


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
    bits = budget.per_head * rows[1] - ladder.head_cost * rows[1]
    if bits <= 0:
        return uniform_plan(scores, 0)
    token = scores.token.reshape(*rows, tokens)
    channel = scores.channel.reshape(*rows, -1)
    if scores.pinned is None:
        available = torch.full((rows[0], 1), float(bits), dtype=torch.float64, device=token.device)
        return Problem(token, channel, None, available, (batch, heads))
    affordable = bits // (2 * rows[1] * ladder.pinned_cost)  # a head; half is left for the rest
    kernels = kernels_for("items", token)
    token, pinned, count = kernels.set_apart(token, scores.pinned.reshape(token.shape), affordable)
    available = bits - count.sum(1, keepdim=True, dtype=torch.float64) * ladder.pinned_cost
    return Problem(token, channel, pinned, available, (batch, heads))
