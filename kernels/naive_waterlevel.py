"""The meaning of `waterlevel` in plain PyTorch: the best key widths of each head at many water levels.

Columns of steps are views of one table ``[P, h, J, F]``, see `allocators.steps`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_points(
    weight: Tensor,
    mass: Tensor,
    columns: tuple[Tensor, Tensor, Tensor, Tensor],
    whole: Tensor,
    loss: Tensor,
    water: Tensor,
) -> tuple[Tensor, Tensor]:
    """The point of each head that minimises ``loss + level * bits``, the first of equals.

    Args:
        weight: ``[P, h, n]`` float64, ascending.
        mass: ``[P, h, n + 1]`` float64, sums of the lightest.
        columns: bar, price, gain and limit of the steps at each point, ``[P, h, J, S]`` float64.
        whole: ``[P, h, J]`` float64, bits of a point if every item makes every step.
        loss: ``[P, h, J]`` float64, what a point loses whatever the items do.
        water: ``[P, L]`` or ``[1, L]`` float64.

    Returns:
        Points ``[P, h, L]`` int64, and their bits ``[P, h, L]`` float64.
    """
    bar, price, gain, limit = (t.unsqueeze(2) for t in columns)  # [P, h, 1, J, S]
    level = water.view(len(water), 1, -1, 1)  # [P, 1, L, 1]
    earned = bar * level.unsqueeze(-1)  # [P, h, L, J, S]
    boundary = torch.searchsorted(weight, earned.flatten(2)).view(earned.shape)
    boundary = torch.minimum(boundary, limit.long())
    lost = (mass.gather(-1, boundary.flatten(2)).view(earned.shape) * gain).sum(-1)  # [P, h, L, J]
    bits = whole.unsqueeze(2) - (boundary * price).sum(-1)
    point = torch.addcmul(lost + loss.unsqueeze(2), level, bits).argmin(-1, keepdim=True)
    return point.squeeze(-1), bits.gather(-1, point).squeeze(-1)


def bracket(
    point: Tensor, bits: Tensor, available: Tensor, water: Tensor, factor: Tensor, wanted: int
) -> tuple[Tensor, Tensor]:
    """What is next to the last water level that is affordable; bits grow as levels fall.

    Args:
        point, bits: ``[P, h, L]`` int64 and float64, of each water level.
        available: ``[P, 1]`` float64 bits of a problem.
        water: ``[P, L]`` or ``[1, L]`` float64, falling; the first is taken to be affordable, the last not to be.
        factor: ``[1, M]`` float64.
        wanted: 0, 1 or 2.

    Returns:
        As many points as wanted, of the last affordable level and the next one, ``[P, h, wanted]`` int64; that level
        times each factor, ``[P, M]`` float64.
    """
    above = (bits.sum(1)[:, 1:-1] <= available).sum(1, keepdim=True)  # [P, 1]
    level = water.expand(len(available), -1).gather(1, above)
    around = level * factor
    if wanted == 0:
        return point[..., :0], around
    ends = above if wanted == 1 else torch.cat([above, above + 1], 1)
    return point.gather(2, ends.unsqueeze(1).expand(-1, point.shape[1], -1)), around
