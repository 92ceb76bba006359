"""How unlike the others each value is, on the GPU in three launches; `naive_leverage` says what it means."""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor

from . import naive_leverage
from .leverage_kernels import distance_kernel, moments_kernel, precision_kernel
from .naive_leverage import RIDGE, SAMPLE
from .window import dense, split_tokens

TILE = 64  # tokens
PART = 4 * TILE  # of a head's sample, of which one program sums a few
MOST_CHANNELS = 128  # of a head whose matrix fits into a program's registers


def precision(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[B, H, D]`` and inverse covariance ``[B, H, D, D]`` of ``values`` ``[B, H, T, D]``, float32.

    The device is not waited for; what has no inverse gives no finite numbers.
    """
    batch, heads, tokens, dim = values.shape
    step = -(-tokens // SAMPLE)
    count, every, width = -(-tokens // step), batch * heads, _width(dim)
    chunk, splits = split_tokens(count, every, PART)
    new = partial(torch.empty, dtype=torch.float32, device=values.device)
    sums, products = new(every, splits, dim), new(every, splits, dim, dim)
    mean, out = new(batch, heads, dim), new(batch, heads, dim, dim)
    shape = {"D": dim, "BD": width, "num_warps": max(4, width // 8)}
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        moments_kernel[(every, splits)](
            values, sums, products, count, step, chunk, heads, splits, *values.stride()[:3], BT=TILE, **shape
        )
        precision_kernel[(every,)](sums, products, mean, out, count, splits, RIDGE, **shape)
    return mean, out


def distances(values: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """``(v - m)^T P (v - m) / D`` of every value, ``[B, H, T]`` float32; 1 where that is no finite number.

    Args:
        values: ``[B, H, T, D]``, the last dimension contiguous.
        mean: ``[B, H, D]`` float32; precision: ``[B, H, D, D]`` float32, symmetric.
    """
    batch, heads, tokens, dim = values.shape
    out = torch.empty(batch, heads, tokens, dtype=torch.float32, device=values.device)
    width, every = _width(dim), batch * heads
    chunk, splits = split_tokens(tokens, every, TILE)
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        distance_kernel[(every, splits)](
            values, mean, precision, out, tokens, chunk, heads, *values.stride()[:3],
            D=dim, BT=TILE, BD=width, num_warps=8 if width > 64 else 4,
        )  # fmt: skip
    return out


def leverage(values: Tensor) -> Tensor:
    """Leverage of each token's value, ``[B, H, T]`` float32.

    Args:
        values: ``[B, H, T, D]``. Where they are not finite, or all alike, every leverage is 1.
    """
    if values.shape[-1] > MOST_CHANNELS:
        return naive_leverage.leverage(values)
    values = dense(values)
    return distances(values, *precision(values))


def _width(dim: int) -> int:
    """The padded head dimension."""
    return max(16, int(triton.next_power_of_2(dim)))
