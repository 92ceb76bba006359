"""Which width a weight earns at a water level: thresholds of one item against its ladder."""

from __future__ import annotations

import torch
from torch import Tensor


def thresholds(cost: Tensor, distortion: Tensor) -> Tensor:
    """Least ``weight / water level`` at which an item takes level ``k`` or higher, for ``k = 1 .. K-1``.

    An item of weight ``w`` takes the level that minimises ``w * distortion + level * cost`` (the
    Lagrangian of the rate-distortion problem). Level ``k`` or higher wins once some ``m >= k`` beats
    every ``i < k``, so the threshold is ``min over m >= k, max over i < k`` of
    ``(cost_m - cost_i) / (distortion_i - distortion_m)``. Levels above the lower convex hull of the
    ladder share the threshold of the next level that lies on it.

    Args:
        cost: ``[..., K]`` bits, ascending.
        distortion: ``[K]``, strictly falling.

    Returns:
        ``[..., K-1]`` float64, ascending.
    """
    cost = cost.double()
    rise = cost.unsqueeze(-1) - cost.unsqueeze(-2)  # [..., m, i]
    drop = distortion.double().unsqueeze(0) - distortion.double().unsqueeze(1)  # [m, i]: d_i - d_m
    ratio = torch.where(drop > 0, rise / torch.where(drop > 0, drop, 1.0), float("inf"))
    levels = range(1, cost.shape[-1])
    per_level = [ratio[..., k:, :k].amax(-1).amin(-1) for k in levels]
    return torch.stack(per_level, -1) if per_level else cost[..., :0]


def hull(threshold: Tensor) -> Tensor:
    """Which of the levels ``1 .. K-1`` lie on the hull, ``[..., K-1]`` bool (the last always does)."""
    last = torch.ones_like(threshold[..., :1], dtype=torch.bool)
    return torch.cat([threshold[..., :-1] < threshold[..., 1:], last], -1)
