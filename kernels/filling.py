"""Filling a budget on the GPU: a launch for what levels save, one for boundaries, two to spend what is left.

Bits are whole numbers, so that their sums are those of the twin, `naive_filling`, in any order.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import naive_filling
from .filling_kernels import rank_kernel, saved_kernel, settled_kernel, spend_kernel
from .naive_filling import AHEAD
from .waterlevel import problem_stride

ROWS, LEVELS, RANKS = 32, 16, 64  # of a tile
MOST = 1 << 14  # next steps of a problem that one program can spend on


def narrowed(
    weight: Tensor, bar: Tensor, price: Tensor, limit: Tensor | None, water: Tensor, need: Tensor, unit: Tensor
) -> Tensor:
    """As `naive_filling.narrowed`; all but columns are contiguous, and these have equal strides."""
    saved = _saved(weight, bar, price, limit, water)
    return naive_filling.spaced(water, naive_filling.last_affordable(saved, need), unit)


def settled(weight: Tensor, bar: Tensor, price: Tensor, limit: Tensor | None, water: Tensor, need: Tensor) -> Tensor:
    """As `naive_filling.settled`, with arguments as of `narrowed`."""
    saved = _saved(weight, bar, price, limit, water)
    (problems, heads, n), levels, steps = weight.shape, water.shape[1], bar.shape[2]
    boundary = torch.empty(problems, heads, steps, dtype=torch.int64, device=weight.device)
    with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
        settled_kernel[(problems,)](
            weight, bar, bar if limit is None else limit, water, saved, need, boundary,
            n, heads * steps, levels, problem_stride(water), *bar.stride()[:2],
            S=steps, BR=ROWS, LP=triton.next_power_of_2(levels), STEPS=n.bit_length(), LIMITED=limit is not None,
        )  # fmt: skip
    return boundary


def _saved(weight: Tensor, bar: Tensor, price: Tensor, limit: Tensor | None, water: Tensor) -> Tensor:
    """Bits of the steps that are not made at each water level, ``[P, L]`` float64."""
    (problems, heads, n), levels, steps = weight.shape, water.shape[1], bar.shape[2]
    saved = torch.empty(problems, levels, dtype=torch.float64, device=weight.device)
    with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
        saved_kernel[(-(-levels // LEVELS), problems)](
            weight, bar, price, bar if limit is None else limit, water, saved,
            n, heads * steps, levels, problem_stride(water), *bar.stride()[:2],
            S=steps, BR=ROWS, BL=LEVELS, STEPS=n.bit_length(), LIMITED=limit is not None,
        )  # fmt: skip
    return saved


def spend(weight: Tensor, price: Tensor, toll: Tensor, rate: Tensor, boundary: Tensor, need: Tensor) -> Tensor:
    """As `naive_filling.spend`, with arguments as of `narrowed`."""
    (problems, heads, n), steps = weight.shape, boundary.shape[2]
    rows = heads * steps
    every, strides = rows * AHEAD, price.stride()[:2]
    if every > MOST:
        return naive_filling.spend(weight, price, toll, rate, boundary, need)
    rank = torch.empty(problems, every, dtype=torch.int32, device=weight.device)
    cost = torch.empty(problems, every, dtype=torch.float64, device=weight.device)
    out, padded = torch.empty_like(boundary), triton.next_power_of_2(every)
    with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
        rank_kernel[(-(-every // RANKS), problems)](
            weight, toll, rate, boundary, rank, cost, n, rows, *strides, S=steps, BI=RANKS
        )
        spend_kernel[(problems,)](
            price, boundary, need, rank, cost, out, rows, *strides,
            S=steps, BR=ROWS, NP=padded, num_warps=4 if padded <= 2048 else 16,
        )  # fmt: skip
    return out
