"""Tokens in blocks of falling weight: what is kept or dropped together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.available import kernels_for
from .problem import Problem


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
        bits: Tensor = kernels_for("items", self.order).spread(boundary, width, self.order, self.block, self.count)
        return bits


def items(problem: Problem, block: int) -> Items:
    """Sort the tokens of a problem; among equal weights later tokens count as heavier."""
    ranked, order = problem.token.sort(dim=-1, stable=True)
    weight, mass = kernels_for("items", ranked).block_weights(ranked, block, problem.pinned is not None)
    return Items(weight, mass, order, block)
