"""The water level that prices tokens and key channels alike, and the key widths it buys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels.available import kernels_for
from ..kernels.naive_items import LEAST_WEIGHT
from .items import Items
from .points import Points
from .steps import Steps

CANDIDATES = 512  # water levels that one round tries
NEAR = 2.0**-20  # octaves


@dataclass(frozen=True)
class Search:
    """How water levels are searched for: candidates on a device, all falling.

    Attributes:
        first: ``[1, L]`` from a level at which nothing is worth a bit to one at which everything is.
        finer: ``[1, L]`` each, factors of the last affordable level to its neighbour, a round each.
        around: ``[1, M]`` factors of a level that is nearly right: close together around 1, and to both ends of the
            range.
        unit: ``[L]`` from 0 to 1.
        exact: whether to go on until the order of any two steps is found. Where tokens come in blocks, rounding
            to them costs more than that.
    """

    first: Tensor
    finer: tuple[Tensor, ...]
    around: Tensor
    unit: Tensor
    exact: bool

    @property
    def rounds(self) -> int:
        """Rounds that `fill` takes around a level that is nearly right."""
        return 3 if self.exact else 1


@lru_cache(maxsize=64)
def make_search(highest: float, octaves: float, exact: bool, device: torch.device) -> Search:
    """Candidates from ``highest`` for bars of at most ``2 ** octaves``."""
    octaves += math.log2(highest / LEAST_WEIGHT) + 1
    unit = torch.linspace(0, 1, CANDIDATES, dtype=torch.float64)
    finer = [torch.exp2(-octaves * unit / (CANDIDATES - 1) ** i) for i in range(1, 3 if exact else 2)]
    apart = NEAR * (octaves / NEAR) ** unit
    around = torch.exp2(torch.cat([apart.flip(0), torch.zeros(1), -apart]))
    first = highest * torch.exp2(-octaves * unit)
    first, around, *later = (t.unsqueeze(0).to(device) for t in (first, around, *finer))
    return Search(first, tuple(later), around, unit.to(device), exact)


def key_points(items: Items, points: Points, available: Tensor, search: Search) -> tuple[tuple[Tensor, ...], Tensor]:
    """Key widths at the lowest water level whose bits are affordable; for an exact search, also just below it.

    For water level ``l`` a head takes the point ``j`` that minimises ``loss + l * bits``, its tokens
    taking the best levels given the point: with sorted weights both are a few look-ups in sums of them.
    Point 0 holds no token, for no bits and the loss of all channels. Each choice is the minimum over
    one set of plans, so that a lower level never gives fewer bits or a greater loss.
    The two differ where many weights tie or a key upgrade jumps; then either may fill the budget better.

    Args:
        available: ``[P, 1]`` bits.

    Returns:
        The choices, ``[P, h]`` points each, and water levels ``[P, M]`` to fill them to.
    """
    steps, kernels = Steps.of(points.rows), kernels_for("waterlevel", items.weight)
    columns = (steps.bar, steps.price, steps.gain, steps.limit)
    water, wanted = search.first, 2 if search.exact else 1
    for factor in (*search.finer, search.around):
        point, bits = kernels.best_points(items.weight, items.mass, columns, points.bits, points.loss, water)
        # Bits grow as the level falls; the last affordable candidate and its successor bracket the rest.
        last = wanted if factor is search.around else 0
        chosen, water = kernels.bracket(point, bits, available, water, factor, last)
    return chosen.unbind(2), water
