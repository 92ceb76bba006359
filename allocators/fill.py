"""Filling a budget with steps of items, best gain per bit first."""

from __future__ import annotations

import torch
from torch import Tensor

from .spend import spend
from .steps import Steps
from .waterlevel import Search

ROUNDS = 3  # of a search through all water levels for the order of any two steps


def fill(
    weight: Tensor, steps: Steps, need: Tensor, anchored: bool, water: Tensor, search: Search, rounds: int
) -> Tensor:
    """Steps that save most distortion: ``[P, h, S]`` int64, index of the lightest item that makes each step.

    Steps are made in order of gain per bit, which is the Lagrangian optimum for the bits they take, then those
    that still fit, in the same order. The water level where the budget ends is searched for in ``rounds`` rounds;
    steps within the last interval count as worth the same, and are made in proportion.

    Args:
        weight: ``[P, h, n]`` float64, ascending.
        steps: of each head, ``[P, h, S]``.
        need: ``[P, 1]`` float64, bits that steps not made have to save: those of all steps less what is available.
        anchored: whether each head with steps makes its first before any head makes more.
        water: ``[P, L]`` or ``[1, L]``, falling water levels of the first round.
    """
    limit, price = steps.limit.long().unsqueeze(2), steps.price.unsqueeze(2)
    water = water.expand(len(weight), -1)
    for last in reversed(range(rounds)):
        bar = steps.bar.unsqueeze(2) * water.view(len(weight), 1, -1, 1)  # [P, h, L, S]
        boundary = torch.searchsorted(weight, bar.flatten(2)).view(bar.shape)
        if anchored:
            boundary = torch.minimum(boundary, limit)
        saved = (boundary * price).sum((1, 3))  # [P, L]
        # The last affordable water level and the next one.
        ends = (saved[:, 1:-1] >= need).sum(1, keepdim=True) + search.pair  # [P, 2]
        if last:
            high, low = torch.split(water.gather(1, ends), 1, 1)
            water = high * (low / high) ** search.unit
    high, low = boundary.gather(2, ends.view(-1, 1, 2, 1).expand(-1, bar.shape[1], -1, bar.shape[3])).unbind(2)
    most, least = torch.split(saved.gather(1, ends), 1, 1)
    share = ((most - need) / (most - least).clamp(min=1.0)).clamp(0.0, 1.0)
    boundary = high - ((high - low) * share.unsqueeze(2)).long()
    for _ in range(rounds):
        boundary = spend(weight, steps, boundary, unspent(steps, boundary, need))
    return boundary


def unspent(steps: Steps, boundary: Tensor, need: Tensor) -> Tensor:
    """Bits that are left, ``[P, 1]`` float64; negative where even the dearest water level was not affordable."""
    return (boundary * steps.price).sum((1, 2)).unsqueeze(1) - need
