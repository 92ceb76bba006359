"""Key widths by a share of the bits: what is left of it once the values are filled."""

from __future__ import annotations

from torch import Tensor

from ..runtime.ladder import Ladder
from .fill import ROUNDS, fill, unspent
from .items import Items
from .keypath import KeyPath
from .points import lowest
from .problem import Problem
from .steps import Steps, StepTable
from .waterlevel import Search


def shared_point(
    problem: Problem, items: Items, ladder: Ladder, path: KeyPath, table: StepTable, search: Search, key_share: float
) -> Tensor:
    """Points ``[P, h]`` that the bits left by the values pay for, as many a token in every head."""
    steps = Steps.of(table.rows[1].expand(*items.weight.shape[:2], -1))  # of values alone
    keeps_all = ladder.value_bits[0] > 0
    whole = steps.whole + lowest(problem, ladder, steps.base) if keeps_all else steps.whole
    need = whole.sum(1) - (1 - key_share) * problem.available
    boundary = fill(items.weight, steps, need, False, search.first, search, ROUNDS)
    for_keys = unspent(steps, boundary, need) + key_share * problem.available  # [P, 1]
    evicted = boundary.where(steps.price > 0, items.count).amin(-1, keepdim=True) * (not keeps_all)
    tokens = (items.count - evicted) * ladder.token_block  # [P, h, 1]
    bits = (path.row - 1) * ladder.key_block * tokens + path.overhead  # [P, h, J]
    affordable = bits <= for_keys.unsqueeze(2) * (tokens / tokens.sum(1, keepdim=True).clamp(min=1))
    return affordable[..., 1:].sum(-1).clamp(min=1) * (tokens > 0).squeeze(-1)
