"""Tokens in blocks of falling weight: what is kept or dropped together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .problem import Problem

# Weights below this share of all are worth the same: next to nothing, but something, so that they fill what is left.
LEAST_WEIGHT = 2.0**-64


@dataclass(frozen=True)
class Items:
    """The tokens of each head by rising weight, in ``n`` blocks counted from the heaviest tokens.

    A cache format stores whole blocks: a boundary between two widths inside one would pay for places that hold
    nothing. The lightest block may be short of tokens, and pinned tokens count as the lightest, which is to say that
    a budget which keeps every token takes the last few to be a little dearer than they are.

    Attributes:
        weight: ``[P, h, n]`` float64, ascending, sums to 1 over a problem.
        mass: ``[P, h, n + 1]`` float64, weight of so many of the lightest blocks.
        order: ``[P, h, T]`` tokens by rising weight, pinned ones first.
        block: tokens of a block.
    """

    weight: Tensor
    mass: Tensor
    order: Tensor
    block: int

    @property
    def count(self) -> int:
        return self.weight.shape[-1]

    def spread(self, boundary: Tensor, width: Tensor) -> Tensor:
        """Width of each token, ``[P, h, T]`` uint8.

        Args:
            boundary: ``[P, h, S]`` index of the lightest block that makes each step.
            width: ``[P, h, S + 1]`` width after so many steps.
        """
        tokens = self.order.shape[-1]
        place = torch.arange(self.count * self.block - tokens, self.count * self.block, device=boundary.device)
        steps = (place >= (boundary * self.block).unsqueeze(-1)).sum(2)  # [P, h, S, T] to [P, h, T]
        bits = width.to(torch.uint8).gather(-1, steps)
        return bits.scatter(-1, self.order, bits)


def items(problem: Problem, block: int) -> Items:
    """Sort the tokens of a problem; among equal weights later tokens count as heavier."""
    ranked, order = problem.token.sort(dim=-1, stable=True)
    if short := -ranked.shape[-1] % block:
        ranked = pad(ranked, (short, 0), value=-1.0)
    # Tokens that are all worth nothing are worth the same, so that they still fill the budget.
    weight = ranked.clamp(min=0.0).view(*ranked.shape[:2], -1, block).sum(-1, dtype=torch.float64) + 1e-60
    if problem.pinned is not None:
        weight = weight.masked_fill(ranked[..., block - 1 :: block] < 0, 0.0)
    weight = (weight / weight.sum((1, 2), keepdim=True)).clamp(min=LEAST_WEIGHT)
    # Summed from the lightest: a difference from the total would be lost to rounding.
    return Items(weight, pad(weight.cumsum(-1), (1, 0)), order, block)
