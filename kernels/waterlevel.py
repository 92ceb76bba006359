"""The best key widths of each head at many water levels, on the GPU: two launches for each round of levels.

Sums of losses are taken in another order than by the twin, `naive_waterlevel`; bits are whole numbers, and exact.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .waterlevel_kernels import best_points_kernel, bracket_kernel

LEVELS, POINTS = 8, 16  # of a tile


def best_points(
    weight: Tensor,
    mass: Tensor,
    columns: tuple[Tensor, Tensor, Tensor, Tensor],
    whole: Tensor,
    loss: Tensor,
    water: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `naive_waterlevel.best_points`; all but columns are contiguous, and these have equal strides."""
    problems, heads, n = weight.shape
    levels, (points, steps) = water.shape[1], columns[0].shape[2:]
    point = torch.empty(problems, heads, levels, dtype=torch.int64, device=weight.device)
    bits = torch.empty(problems, heads, levels, dtype=torch.float64, device=weight.device)
    with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
        best_points_kernel[(-(-levels // LEVELS), problems * heads)](
            weight, mass, *columns, whole.contiguous(), loss.contiguous(), water, point, bits,
            n, points, heads, levels, problem_stride(water), *columns[0].stride()[:3],
            S=steps, SP=triton.next_power_of_2(steps), BL=LEVELS, BJ=POINTS, STEPS=n.bit_length(),
        )  # fmt: skip
    return point, bits


def bracket(
    point: Tensor, bits: Tensor, available: Tensor, water: Tensor, factor: Tensor, wanted: int
) -> tuple[Tensor, Tensor]:
    """As `naive_waterlevel.bracket`; all are contiguous."""
    problems, heads, levels = point.shape
    factors = factor.shape[1]
    chosen = torch.empty(problems, heads, wanted, dtype=torch.int64, device=point.device)
    around = torch.empty(problems, factors, dtype=torch.float64, device=point.device)
    with torch.cuda.device_of(point):  # type: ignore[no-untyped-call]
        bracket_kernel[(problems,)](
            point, bits, available, water, factor, chosen, around, heads, levels, factors, problem_stride(water),
            LP=triton.next_power_of_2(levels), MP=triton.next_power_of_2(factors), WANTED=wanted, BH=16,
        )  # fmt: skip
    return chosen, around


def problem_stride(water: Tensor) -> int:
    """Elements from one problem's water levels to the next one's; 0 where all have the same."""
    return water.shape[1] if len(water) > 1 else 0
