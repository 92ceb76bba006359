"""Reverse water-filling of tokens and channels: the reference allocator."""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch
from torch import Tensor

from ..runtime.errors import BudgetError
from ..runtime.interfaces import Allocator, BitPlan, Budget, Ladder, Scope, Scores
from .fill import fill
from .keypath import KeyPath, key_path
from .problem import Problem, ScopeOptions, pose
from .waterlevel import KeyPoints, key_points


class WaterfillOptions(ScopeOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of ``waterfill``."""

    ladder: Annotated[
        tuple[int, ...] | None, msgspec.Meta(description="widths to use, such as 0,2,4,8,16; all of the format's if none")
    ] = None
    key_share: Annotated[
        Annotated[float, msgspec.Meta(gt=0, lt=1)] | None,
        msgspec.Meta(description="share of the bits for keys; one water level for both if none"),
    ] = None
    key_weight: Annotated[
        float, msgspec.Meta(gt=0, description="worth of all key channels against all values at one water level")
    ] = 1.0


class Waterfill(Allocator):
    """Bits that minimise the modelled distortion within the budget (arXiv 2605.08317; method, "Rate-distortion problem").

    The distortion of a plan is ``sum_t w_t eps_V(b_t) / sum_t w_t + key_weight * sum_c u_c eps_K(b_c) / sum_c u_c``
    over the heads that compete. A token costs its value and, at the width of the key channels, its key,
    so tokens and channels are coupled; one water level prices both. With ``key_share`` values are filled
    first within their share and keys get what is left, as in the paper.

    Exact: key widths follow the Lagrangian optimum, values the optimum for these key widths, and the
    remainder is spent on the upgrades that still fit, best gain per bit first.
    """

    Options = WaterfillOptions
    options: WaterfillOptions

    @property
    def scope(self) -> Scope:
        return self.options.scope

    def allocate(self, scores: Scores, ladder: Ladder, budget: Budget) -> BitPlan:
        if self.options.ladder is not None:
            ladder = ladder.restrict(self.options.ladder)
        problem = pose(scores, ladder, budget, self.scope)
        if isinstance(problem, BitPlan):
            return problem
        return water_fill(problem, ladder, self.options.key_weight, self.options.key_share)


def water_fill(problem: Problem, ladder: Ladder, key_weight: float, key_share: float | None) -> BitPlan:
    """The best plan of a posed problem on the levels of ``ladder``."""
    path = key_path(problem.channel, ladder)
    if key_share is None:
        choices = key_points(problem, ladder, path, key_weight)
    else:
        choices = (_shared_points(problem, ladder, path, key_share),)
    distortion = torch.tensor(ladder.value_distortion, dtype=torch.float64, device=path.loss.device)
    levels, losses = [], []
    for choice in choices:
        level = fill_values(problem, ladder, path, choice)
        key_loss = path.loss.gather(-1, choice.point.unsqueeze(-1)).sum((1, 2))
        losses.append((problem.token * distortion[level]).sum((1, 2)) + key_weight * key_loss)
        levels.append(level)
    pick = torch.stack(losses).argmin(0)  # [P]
    rows = torch.arange(len(pick), device=pick.device)
    level = torch.stack(levels)[pick, rows]
    point = torch.stack([choice.point for choice in choices])[pick, rows]
    table = torch.tensor(ladder.value_bits, device=level.device)
    return problem.plan(table[level], path.widths(point, ladder.key_bits).long())


def fill_values(problem: Problem, ladder: Ladder, path: KeyPath, keys: KeyPoints) -> Tensor:
    """Levels of tokens ``[P, h, T]`` for the bits that the chosen key widths leave."""
    point = keys.point.unsqueeze(-1)
    cost = token_cost(ladder, path.bits.gather(-1, point))  # [P, h, K]
    overhead = (path.overhead.gather(-1, point).squeeze(-1) * keys.used).sum(1)
    base = (cost[..., :1] * problem.free.sum(-1, keepdim=True)).sum((1, 2))
    available = problem.available - overhead - base
    if ladder.value_bits[0] > 0 and bool((available < 0).any()):
        raise BudgetError(
            f"keeping every token takes at least {ladder.value_bits[0]} bits a channel, "
            f"{-int(available.min()) // 8 + 1} bytes more than the budget; raise the budget or allow width 0"
        )
    distortion = torch.tensor(ladder.value_distortion, dtype=torch.float64, device=cost.device)
    return fill(problem.token, problem.free & keys.used.unsqueeze(-1), cost, distortion, available)


def token_cost(ladder: Ladder, key_bits: Tensor) -> Tensor:
    """Bits of a token at each value level, key included: ``key_bits`` ``[..., 1]`` to ``[..., K]``."""
    value = torch.tensor(ladder.value_cost, device=key_bits.device)
    kept = torch.tensor(ladder.value_bits, device=key_bits.device) > 0
    return value + kept * key_bits


def _shared_points(problem: Problem, ladder: Ladder, path: KeyPath, key_share: float) -> KeyPoints:
    """Key widths that the bits left by the values pay for, the same bits a token in every head."""
    distortion = torch.tensor(ladder.value_distortion, dtype=torch.float64, device=path.loss.device)
    cost = token_cost(ladder, torch.zeros_like(path.bits[..., :1]))
    for_values = ((1 - key_share) * problem.available.double()).long()
    level = fill(problem.token, problem.free, cost, distortion, for_values)
    spent = cost.gather(-1, level).masked_fill(~problem.free, 0).sum((1, 2))
    tokens = ((level > 0) & problem.free).sum(-1, keepdim=True)  # [P, h, 1]
    per_token = (problem.available - spent)[:, None, None] / tokens.sum(1, keepdim=True).clamp(min=1)
    affordable = path.bits * tokens + path.overhead <= per_token * tokens
    point = (affordable.sum(-1) - 1).clamp(min=0)
    return KeyPoints(point, tokens.squeeze(-1) > 0)
