"""Reverse water-filling of tokens and channels: the reference allocator."""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch
from torch import Tensor

from ..runtime.errors import BudgetError, ConfigError
from ..runtime.interfaces import Allocator, Scope
from ..runtime.ladder import Ladder
from ..runtime.plan import BitPlan, Budget, Scores
from .fill import fill
from .keypath import KeyPath, key_path
from .problem import Problem, ScopeOptions, pose
from .waterlevel import KeyPoints, key_points


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
    ] = 1.0


class Waterfill(Allocator):
    """Bits that minimise the modelled distortion within the budget (arXiv 2605.08317).

    The distortion of a plan is ``sum_t w_t eps_V(b_t) / sum_t w_t + key_weight * sum_c u_c eps_K(b_c) / sum_c u_c``
    over the heads that compete; a head without coded tokens has 0-bit channels. A token costs its value
    and, at the width of the key channels, its key, so tokens and channels are coupled; one water level
    prices both. With ``key_share`` values are filled first within their share and keys get what is left,
    as in the paper.

    Exact: key widths follow the Lagrangian optimum, values the optimum for these key widths, and the
    remainder is spent on the upgrades that still fit, best gain per bit first. No plan within the bits
    of the last Lagrangian optimum that fits has a lower distortion, and more budget never has a higher one.

    Raises:
        ConfigError: ``ladder`` has a width that the format lacks, or none above 0.
        BudgetError: ``ladder`` lacks 0, and its lowest width is more than the budget.
    """

    Options = WaterfillOptions
    options: WaterfillOptions

    @property
    def scope(self) -> Scope:
        return self.options.scope

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
    path = key_path(problem.channel, ladder)
    choices: tuple[KeyPoints, ...]
    if key_share is None:
        choices = key_points(problem, ladder, path, key_weight)
    else:
        choices = (_shared_points(problem, ladder, path, key_share),)
    point = torch.stack([choice.point for choice in choices])  # [C, P, h]
    used = torch.stack([choice.used for choice in choices])
    level, left = fill_values(problem, ladder, path, point, used, anchor=key_share is None)
    distortion = torch.tensor(ladder.value_distortion, dtype=torch.float64, device=level.device)
    key_loss = path.loss.expand(len(choices), *path.loss.shape).gather(-1, point.unsqueeze(-1)).squeeze(-1)
    key_loss = torch.where(used, key_loss, problem.channel.sum(-1)).sum(2)  # [C, P]
    loss = (problem.token * distortion[level]).sum((2, 3)) + key_weight * key_loss
    if ladder.value_bits[0] > 0:
        fits = left >= 0
        if not bool(fits.any(0).all()):
            raise BudgetError(
                f"keeping every token takes at least {ladder.value_bits[0]} bits a channel, "
                f"{-int(left.amax(0).min()) // 8 + 1} bytes more than the budget; raise the budget or allow width 0"
            )
    else:  # a choice whose heads do not all get a token costs the loss of their keys without saying so
        fits = ((level > 0).any(-1) | ~used).all(-1) | (key_share is not None)
    pick = loss.masked_fill(~fits, float("inf")).argmin(0)  # [P]
    rows = torch.arange(len(pick), device=pick.device)
    table = torch.tensor(ladder.value_bits, device=level.device)
    widths = path.widths(point[pick, rows], ladder.key_bits)
    return problem.plan(table[level[pick, rows]], widths.long())


def fill_values(
    problem: Problem, ladder: Ladder, path: KeyPath, point: Tensor, used: Tensor, anchor: bool
) -> tuple[Tensor, Tensor]:
    """Levels of tokens ``[C, P, h, T]`` for the bits that ``C`` choices of key widths leave, and these bits ``[C, P]``.

    Args:
        point: ``[C, P, h]``, points of the key path.
        used: ``[C, P, h]`` bool, heads that hold coded tokens at all.
        anchor: whether each of these heads is given a token before any is given more.
    """
    choices = point.shape[0]

    def at(table: Tensor) -> Tensor:
        return table.expand(choices, *table.shape).gather(-1, point.unsqueeze(-1))  # [C, P, h, 1]

    cost = token_cost(ladder, at(path.bits))  # [C, P, h, K]
    free = problem.free & used.unsqueeze(-1)
    base = (cost[..., :1] * problem.free.sum(-1, keepdim=True)).sum((2, 3))
    available = problem.available - (at(path.overhead).squeeze(-1) * used).sum(2) - base  # [C, P]
    distortion = torch.tensor(ladder.value_distortion, dtype=torch.float64, device=cost.device)
    weights = problem.token.expand(choices, *problem.token.shape).flatten(0, 1)
    anchored = used.flatten(0, 1) if anchor and ladder.value_bits[0] == 0 else None
    level = fill(weights, free.flatten(0, 1), cost.flatten(0, 1), distortion, available.flatten(), anchored)
    return level.reshape(choices, *problem.token.shape), available


def token_cost(ladder: Ladder, key_bits: Tensor) -> Tensor:
    """Bits of a token at each value level, key included: ``key_bits`` ``[..., 1]`` to ``[..., K]``."""
    value = torch.tensor(ladder.value_cost, device=key_bits.device)
    kept = torch.tensor(ladder.value_bits, device=key_bits.device) > 0
    return value + kept * key_bits


def _shared_points(problem: Problem, ladder: Ladder, path: KeyPath, key_share: float) -> KeyPoints:
    """Key widths that the bits left by the values pay for, the same bits a token in every head."""
    distortion = torch.tensor(ladder.value_distortion, dtype=torch.float64, device=path.loss.device)
    cost = token_cost(ladder, torch.zeros_like(path.bits[..., :1]))
    base = (cost[..., :1] * problem.free.sum(-1, keepdim=True)).sum((1, 2))
    for_values = ((1 - key_share) * problem.available.double()).long() - base
    level = fill(problem.token, problem.free, cost, distortion, for_values)
    spent = cost.gather(-1, level).masked_fill(~problem.free, 0).sum((1, 2))
    held = torch.tensor(ladder.value_bits, device=level.device)[level] > 0
    tokens = (held & problem.free).sum(-1, keepdim=True)  # [P, h, 1]
    per_token = (problem.available - spent)[:, None, None] / tokens.sum(1, keepdim=True).clamp(min=1)
    affordable = path.bits * tokens + path.overhead <= per_token * tokens
    point = (affordable.sum(-1) - 1).clamp(min=0)
    return KeyPoints(point, tokens.squeeze(-1) > 0)
