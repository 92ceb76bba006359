"""Reverse water-filling of tokens and channels: the reference allocator."""

from __future__ import annotations

from typing import Annotated

import msgspec
from torch import Tensor

from ..runtime.errors import BudgetError, ConfigError
from ..runtime.interfaces import Allocator, Scope
from ..runtime.ladder import Ladder
from ..runtime.plan import BitPlan, Budget, Scores
from .fill import ROUNDS, fill
from .filling import Filling, better
from .items import items
from .keypath import key_path
from .keyshare import shared_point
from .points import make_points
from .problem import Problem, ScopeOptions, pose
from .steps import step_table
from .waterlevel import key_points, make_search


class WaterfillOptions(ScopeOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of ``waterfill``."""

    ladder: Annotated[
        tuple[int, ...] | None,
        msgspec.Meta(description="widths to use, such as 0,2,4,8,16; all of the format's if none"),
    ] = None
    key_share: Annotated[
        Annotated[float, msgspec.Meta(gt=0, lt=1)] | None,
        msgspec.Meta(description="share of the bits for keys; one water level for both if none"),
    ] = None
    key_weight: Annotated[
        float, msgspec.Meta(gt=0, description="worth of all key channels against all values at one water level")
    ] = 6.0


class Waterfill(Allocator):
    """Bits that minimise the modelled distortion within the budget (arXiv 2605.08317).

    The distortion of a plan is ``sum_t w_t eps_V(b_t) / sum_t w_t + key_weight * sum_c u_c eps_K(b_c) / sum_c u_c``
    over the heads that compete; a head without coded tokens has 0-bit channels. A token costs its value
    and, at the width of the key channels, its key, so tokens and channels are coupled; one water level
    prices both. With ``key_share`` values are filled first within their share and keys get what is left,
    as in the paper.

    Key widths follow the Lagrangian optimum, values the optimum for these key widths, and the remainder is
    spent on the upgrades that still fit, best gain per bit first. A plan costs no more than a budget of any size.

    Where the cache format stores tokens in blocks, the tokens of a head are taken by falling weight in such
    blocks, each of them as one; no place is paid for that holds nothing, but in a head's lightest block. Without
    blocks the result is exact: no plan within the bits of the last Lagrangian optimum that fits has a lower
    distortion, and more budget never has a higher one. With blocks the water level that sets the key widths is
    found to a few parts in ten thousand, which changes the distortion by less than that.

    Raises:
        ConfigError: ``ladder`` has a width that the format lacks, or none above 0.
        BudgetError: ``ladder`` lacks 0, and its lowest width is more than the budget.
    """

    Options = WaterfillOptions
    options: WaterfillOptions

    @property
    def scope(self) -> Scope:
        return self.options.scope

    @property
    def evicts(self) -> bool:
        return self.options.ladder is None or 0 in self.options.ladder

    def allocate(self, scores: Scores, ladder: Ladder, budget: Budget) -> BitPlan:
        if self.options.ladder is not None:
            ladder = ladder.restrict(self.options.ladder)
            if ladder.value_bits == (0,):
                raise ConfigError("ladder: it needs a width above 0")
        problem = pose(scores, ladder, budget, self.scope)
        if isinstance(problem, BitPlan):
            return problem
        return water_fill(problem, ladder, self.options.key_weight, self.options.key_share)


def water_fill(problem: Problem, ladder: Ladder, key_weight: float, key_share: float | None) -> BitPlan:
    """The best plan of a posed problem on the levels of ``ladder``.

    Raises:
        BudgetError: the ladder has no width 0, and its lowest is more than the budget.
    """
    blocks = items(problem, ladder.token_block)
    path = key_path(problem.channel, ladder)
    device, keeps_all = blocks.weight.device, ladder.value_bits[0] > 0
    table = step_table(ladder, blocks.count, device)
    search = make_search(2 * (1 + key_weight), table.octaves, ladder.token_block == 1, device)
    points = make_points(problem, ladder, path, table, key_weight)
    if key_share is None:
        choices, water = key_points(blocks, points, problem.available, search)
    else:
        choices, water = (shared_point(problem, blocks, ladder, path, table, search, key_share),), search.first
    fillings = []
    for point in choices:
        steps, need = points.steps_at(point), points.at(points.bits, point).sum(1) - problem.available
        rounds = search.rounds if key_share is None else ROUNDS
        boundary = fill(blocks.weight, steps, need, key_share is None, water, search, rounds)
        fillings.append(Filling(point, steps, boundary, need))
    if keeps_all:
        _check_budget(fillings[0].left, ladder)
    best = fillings[0] if len(fillings) == 1 else better(blocks, points, *fillings)
    key_bits = path.widths(best.point, ladder)
    if key_share is not None and not keeps_all:  # a head may hold no token; it has no channels then
        key_bits = key_bits * ((best.boundary < blocks.count) * best.steps.width[..., 1:]).any(-1, keepdim=True)
    return problem.plan(blocks.spread(best.boundary, best.steps.width), key_bits)


def _check_budget(left: Tensor, ladder: Ladder) -> None:
    if bool((left < 0).any()):
        raise BudgetError(
            f"keeping every token takes at least {ladder.value_bits[0]} bits a channel, "
            f"{-int(left.min()) // 8 + 1} bytes more than the budget; raise the budget or allow width 0"
        )
