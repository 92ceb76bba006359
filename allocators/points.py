"""What a head costs and loses at every point of its path of key widths."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..runtime.ladder import Ladder
from .keypath import KeyPath
from .problem import Problem
from .steps import Steps, StepTable


@dataclass(frozen=True)
class Points:
    """For each point of each head's path of key widths.

    Attributes:
        rows: ``[P, h, J, F]`` rows of the table of steps.
        bits: ``[P, h, J]`` float64, bits of a head if every item makes every step.
        loss: ``[P, h, J]`` float64, what the channels lose.
    """

    rows: Tensor
    bits: Tensor
    loss: Tensor

    def at(self, table: Tensor, point: Tensor) -> Tensor:
        """``table`` ``[P, h, J]`` at a point of each head ``[P, h]``, ``[P, h, 1]``."""
        return table.gather(2, point.unsqueeze(-1))

    def steps_at(self, point: Tensor) -> Steps:
        """Steps at a point of each head, ``[P, h, S]``."""
        index = point.view(*point.shape, 1, 1).expand(-1, -1, 1, self.rows.shape[-1])
        return Steps.of(self.rows.gather(2, index).squeeze(2))


def make_points(problem: Problem, ladder: Ladder, path: KeyPath, table: StepTable, key_weight: float) -> Points:
    """The points of ``path``."""
    rows = table.rows[path.row]
    steps = Steps.of(rows)
    bits = path.overhead + steps.whole.squeeze(-1)
    if ladder.value_bits[0] > 0:
        bits = bits + lowest(problem, ladder, steps.base.squeeze(-1))
    return Points(rows, bits, path.loss if key_weight == 1 else path.loss * key_weight)


def lowest(problem: Problem, ladder: Ladder, base: Tensor) -> Tensor:
    """Bits of all tokens at the lowest width, ``[P, h, J]``, where a block of them takes ``base`` bits."""
    tokens: Tensor | int = problem.token.shape[-1]
    if problem.pinned is not None:
        tokens = tokens - problem.pinned.sum(-1, keepdim=True)
    count = -(-tokens // ladder.token_block)
    metadata = ladder.value_cost[0] - ladder.value_bits[0] * ladder.head_dim  # a place without a token takes none
    return base * count - (count * ladder.token_block - tokens) * metadata
