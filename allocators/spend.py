"""Spending what a water level leaves: the next steps of each head that still fit, best gain per bit first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .steps import NEVER, Steps

AHEAD = 16  # items that each boundary may move by
PASSES = 2  # how often a step may be too much and cheaper ones after it are tried


def spend(weight: Tensor, steps: Steps, boundary: Tensor, left: Tensor) -> Tensor:
    """Boundaries after the steps that ``left`` bits buy.

    Args:
        weight: ``[P, h, n]`` float64, ascending.
        boundary: ``[P, h, S]`` int64, index of the lightest item that makes each step.
        left: ``[P, 1]`` float64 bits.
    """
    ahead = torch.arange(1, AHEAD + 1, device=weight.device)
    item = boundary.unsqueeze(-1) - ahead  # [P, h, S, A]
    # It does not make the step before this one, or there is no such item.
    closed = item < pad(boundary[..., :-1], (1, 0)).unsqueeze(-1)
    worth = weight.gather(-1, item.clamp(min=0).flatten(2)).view(item.shape) * steps.rate.unsqueeze(-1)
    cost = steps.toll.unsqueeze(-1).masked_fill(closed, NEVER).flatten(1)  # [P, h * S * A]
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
