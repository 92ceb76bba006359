"""A choice of key widths with its tokens, and the better of two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .fill import unspent
from .items import Items
from .points import Points
from .steps import Steps


@dataclass(frozen=True)
class Filling:
    """Tokens within a budget for one choice of key widths.

    Attributes:
        point: ``[P, h]`` point of each head's path of key widths.
        steps: of each head at this point, ``[P, h, S]``.
        boundary: ``[P, h, S]`` index of the lightest item that makes each step.
        need: ``[P, 1]`` bits that steps not made have to save.
    """

    point: Tensor
    steps: Steps
    boundary: Tensor
    need: Tensor

    @property
    def left(self) -> Tensor:
        """Bits that are left, ``[P, 1]``; negative where the budget is exceeded."""
        return unspent(self.steps, self.boundary, self.need)

    def lost(self, items: Items, points: Points) -> Tensor:
        """Modelled distortion ``[P, 1]``, but for what every plan loses; infinite where the budget is exceeded."""
        tokens = (items.mass.gather(-1, self.boundary) * self.steps.gain).sum(-1, keepdim=True)  # [P, h, 1]
        lost = (tokens + points.at(points.loss, self.point)).sum(1)
        return lost.masked_fill(self.left < 0, float("inf"))


def better(items: Items, points: Points, one: Filling, other: Filling) -> Filling:
    """For each problem the filling that loses less; the first where neither does."""
    wins = other.lost(items, points) < one.lost(items, points)  # [P, 1]
    point = torch.where(wins, other.point, one.point)
    boundary = torch.where(wins.unsqueeze(-1), other.boundary, one.boundary)
    return Filling(point, points.steps_at(point), boundary, torch.where(wins, other.need, one.need))
