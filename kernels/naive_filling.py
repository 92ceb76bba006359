"""The meaning of `filling` in plain PyTorch: steps made at a water level, and those that what is left buys.

``P`` problems of ``h`` heads, each with ``n`` items and ``S`` steps; a boundary is the index of the lightest item that
makes a step. Columns of steps ``[P, h, S]`` are views of one table, see `allocators.steps`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

NEVER = 2.0**50  # bits that no budget has
AHEAD = 16  # items that each boundary may move by
PASSES = 2  # how often a step may be too much and cheaper ones after it are tried


def narrowed(
    weight: Tensor, bar: Tensor, price: Tensor, limit: Tensor | None, water: Tensor, need: Tensor, unit: Tensor
) -> Tensor:
    """Water levels ``[P, M]`` from the last affordable one to the next, spaced as ``unit`` ``[M]`` from 0 to 1.

    Args:
        weight: ``[P, h, n]`` float64, ascending.
        bar, price: columns of the steps.
        limit: the highest boundaries, if there are any.
        water: ``[P, L]`` or ``[1, L]`` float64, falling; the first is taken to be affordable, the last not to be.
        need: ``[P, 1]`` float64, bits that steps not made have to save.
    """
    saved, _ = _saved(weight, bar, price, limit, water)
    return spaced(water, last_affordable(saved, need), unit)


def settled(weight: Tensor, bar: Tensor, price: Tensor, limit: Tensor | None, water: Tensor, need: Tensor) -> Tensor:
    """Boundaries ``[P, h, S]`` int64 between those at the last affordable water level and at the next one.

    Args: as of `narrowed`.
    """
    saved, boundary = _saved(weight, bar, price, limit, water)
    ends = last_affordable(saved, need)
    index = ends.view(-1, 1, 2, 1).expand(-1, bar.shape[1], -1, bar.shape[2])
    high, low = boundary.gather(2, index).unbind(2)
    most, least = torch.split(saved.gather(1, ends), 1, 1)
    share = ((most - need) / (most - least).clamp(min=1.0)).clamp(0.0, 1.0)
    return high - ((high - low) * share.unsqueeze(2)).long()


def last_affordable(saved: Tensor, need: Tensor) -> Tensor:
    """Index of the last water level that saves enough, and of the next, ``[P, 2]``."""
    above = (saved[:, 1:-1] >= need).sum(1, keepdim=True)
    return torch.cat([above, above + 1], 1)


def spaced(water: Tensor, ends: Tensor, unit: Tensor) -> Tensor:
    """Levels between two of ``water``, which ``ends`` ``[P, 2]`` names, as of `narrowed`."""
    high, low = torch.split(water.expand(len(ends), -1).gather(1, ends), 1, 1)
    return high * (low / high) ** unit


def _saved(weight: Tensor, bar: Tensor, price: Tensor, limit: Tensor | None, water: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of the steps that are not made at each water level, ``[P, L]`` float64, and boundaries ``[P, h, L, S]``."""
    earned = bar.unsqueeze(2) * water.view(len(water), 1, -1, 1)
    boundary = torch.searchsorted(weight, earned.flatten(2)).view(earned.shape)
    if limit is not None:
        boundary = torch.minimum(boundary, limit.long().unsqueeze(2))
    return (boundary * price.unsqueeze(2)).sum((1, 3)), boundary


def spend(weight: Tensor, price: Tensor, toll: Tensor, rate: Tensor, boundary: Tensor, need: Tensor) -> Tensor:
    """Boundaries after the next steps of each head that still fit, best gain per bit first.

    Args:
        weight: ``[P, h, n]`` float64, ascending.
        price, toll, rate: columns of the steps.
        boundary: ``[P, h, S]`` int64.
        need: ``[P, 1]`` float64, bits that steps not made have to save.
    """
    left = unspent(price, boundary, need)
    item = boundary.unsqueeze(-1) - torch.arange(1, AHEAD + 1, device=weight.device)  # [P, h, S, A]
    # It does not make the step before this one, or there is no such item.
    closed = item < pad(boundary[..., :-1], (1, 0)).unsqueeze(-1)
    worth = weight.gather(-1, item.clamp(min=0).flatten(2)).view(item.shape) * rate.unsqueeze(-1)
    cost = toll.unsqueeze(-1).masked_fill(closed, NEVER).flatten(1)  # [P, h * S * A]
    order = worth.flatten(1).argsort(dim=1, descending=True, stable=True)
    cost = cost.gather(1, order)
    for _ in range(PASSES):
        # Up to the first step that no longer fits; the next pass leaves out all that cost too much.
        tried = cost * (cost <= left)
        bought = tried * (tried.cumsum(1) <= left)
        left = left - bought.sum(1, keepdim=True)
        cost = cost - bought
    made = cost == 0
    return boundary - made.scatter(1, order, made).view(item.shape).sum(-1)


def unspent(price: Tensor, boundary: Tensor, need: Tensor) -> Tensor:
    """Bits that are left, ``[P, 1]`` float64; negative where even the dearest water level was not affordable."""
    return (boundary * price).sum((1, 2)).unsqueeze(1) - need
