"""Water-filling of tokens: the best widths of values within a budget, by one sort."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .levels import hull, thresholds

# What the sort leaves is less than one upgrade costs. Upgrades differ in cost by less than this factor
# (at most 16 bits of key and value against 2 of a value alone), so this many more spend what can be spent.
PICKS = 10


@dataclass(frozen=True)
class Steps:
    """Every upgrade of every token from one hull level to the next, sorted by gain per bit.

    Attributes:
        item: ``[P, S]`` index into the flattened ``[h * T]`` tokens.
        ordinal: ``[P, S]`` how many upgrades of the same token come before this one.
        cost: ``[P, S]`` int64 bits.
        level: ``[P, S]`` level reached.
        exists: ``[P, S]`` bool; false for pinned tokens and levels off the hull, which sort last.
    """

    item: Tensor
    ordinal: Tensor
    cost: Tensor
    level: Tensor
    exists: Tensor


def fill(
    weights: Tensor,
    free: Tensor,
    cost: Tensor,
    distortion: Tensor,
    available: Tensor,
    anchored: Tensor | None = None,
) -> Tensor:
    """Levels of tokens that minimise ``sum w * distortion`` within ``available`` bits.

    Upgrades are taken in order of gain per bit, which is the Lagrangian optimum for the bits they
    take; then those that still fit, in the same order. More budget never gives a worse result: an
    upgrade that a smaller budget had to skip gains more than all that this budget could buy instead.

    Args:
        weights: ``[P, h, T]`` float64.
        free: ``[P, h, T]`` bool, tokens to decide on; others stay at level 0.
        cost: ``[P, h, K]`` bits of a token at each level, int64, ascending; level 0 is paid by the caller.
        distortion: ``[K]``, strictly falling.
        available: ``[P]`` bits, int64.
        anchored: ``[P, h]`` bool, heads whose heaviest free token makes its first upgrade before all others; none
            if None.

    Returns:
        Levels ``[P, h, T]`` int64.
    """
    if cost.shape[-1] == 1:  # nothing to decide
        return torch.zeros(weights.shape, dtype=torch.int64, device=weights.device)
    steps = _sorted_steps(weights, free, cost, distortion, anchored)
    fits = (steps.cost.cumsum(1) <= available.unsqueeze(1)) & steps.exists  # [P, S], true up to some step
    spent = steps.cost.masked_fill(~fits, 0).sum(1)
    done = torch.zeros(weights.shape[0], weights[0].numel(), dtype=torch.int64, device=weights.device)
    done.scatter_add_(1, steps.item, fits.long())  # upgrades made of each token
    level = torch.zeros_like(done)
    level.scatter_reduce_(1, steps.item, steps.level.masked_fill(~fits, 0), "amax")
    left = available - spent
    for _ in range(PICKS):
        affordable = steps.exists & (steps.cost <= left.unsqueeze(1))
        open_ = affordable & (done.gather(1, steps.item) == steps.ordinal)
        first = open_.int().argmax(1, keepdim=True)  # [P, 1]
        found = open_.gather(1, first)
        item = steps.item.gather(1, first)
        done.scatter_add_(1, item, found.long())
        level.scatter_reduce_(1, item, steps.level.gather(1, first).masked_fill(~found, 0), "amax")
        left = left - steps.cost.gather(1, first).masked_fill(~found, 0).squeeze(1)
    return level.reshape(weights.shape)


def _sorted_steps(weights: Tensor, free: Tensor, cost: Tensor, distortion: Tensor, anchored: Tensor | None) -> Steps:
    problems, heads, tokens = weights.shape
    bar = thresholds(cost, distortion)  # [P, h, K-1]
    on_hull = hull(bar)
    levels = bar.shape[-1]
    ordinal = on_hull.long().cumsum(-1) - 1
    # Cost from the hull level below: level 0, or the highest hull level before this one.
    reached = torch.arange(1, levels + 1, device=cost.device).expand_as(bar)
    below = torch.where(on_hull, reached, 0).cummax(-1).values
    below = torch.cat([torch.zeros_like(below[..., :1]), below[..., :-1]], -1)
    rise = cost[..., 1:] - cost.gather(-1, below)
    shape = (problems, heads, tokens, levels)
    exists = free.unsqueeze(-1) & on_hull.unsqueeze(2)  # [P, h, T, K-1]
    worth = (weights.unsqueeze(-1) / bar.unsqueeze(2)).masked_fill(~exists, -1.0)
    if anchored is not None:
        heaviest = weights.masked_fill(~free, -1.0).argmax(-1)  # [P, h]
        of_heaviest = torch.arange(tokens, device=cost.device) == heaviest.unsqueeze(-1)  # [P, h, T]
        first = on_hull & (ordinal == 0)  # [P, h, K-1]
        anchor = (of_heaviest & anchored.unsqueeze(-1)).unsqueeze(-1) & first.unsqueeze(2) & exists
        worth = worth.masked_fill(anchor, float("inf"))
    order = worth.reshape(problems, -1).argsort(dim=1, descending=True, stable=True)  # [P, S]

    def flat(table: Tensor) -> Tensor:
        return table.unsqueeze(2).expand(shape).reshape(problems, -1).gather(1, order)

    return Steps(
        item=order // levels,
        ordinal=flat(ordinal),
        cost=flat(rise),
        level=flat(reached),
        exists=exists.reshape(problems, -1).gather(1, order),
    )
