"""How unlike the others each value is, on the GPU in four launches; `naive_leverage` says what it means."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .leverage_kernels import distance_kernel, moments_kernel, precision_kernel
from .naive_leverage import ALIKE, BLOCK, RIDGE, SAMPLE
from .window import dense, split_tokens

TILE = 64  # tokens
PART = 4 * TILE  # of a head's sample, of which one program sums a few


def precision(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[B, H, D]`` and inverse covariances ``[B, H, N, BLOCK, BLOCK]`` of ``values`` ``[B, H, T, D]``, float32.

    The device is not waited for; what has no inverse gives no finite numbers.
    """
    batch, heads, tokens, dim = values.shape
    step, parts = -(-tokens // SAMPLE), -(-dim // BLOCK)
    count, every = -(-tokens // step), batch * heads * parts
    chunk, splits = split_tokens(count, every, PART)
    new = partial(torch.empty, dtype=torch.float32, device=values.device)
    sums, products = new(every, splits, BLOCK), new(every, splits, BLOCK, BLOCK)
    mean, out = new(batch, heads, dim), new(batch, heads, parts, BLOCK, BLOCK)
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        moments_kernel[(every, splits)](
            values, sums, products, count, step, chunk, heads, splits, *values.stride()[:3], D=dim, BT=TILE, BD=BLOCK
        )
        precision_kernel[(every,)](sums, products, mean, out, count, splits, RIDGE, ALIKE, D=dim, BD=BLOCK, num_warps=1)
    return mean, out


def distances(values: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """``(v - m)^T P (v - m) / D`` of every value, ``[B, H, T]`` float32; a block that has no finite number counts as 1.

    Args:
        values: ``[B, H, T, D]``, the last dimension contiguous.
        mean: ``[B, H, D]`` float32; precision: ``[B, H, N, BLOCK, BLOCK]`` float32, symmetric.
    """
    batch, heads, tokens, dim = values.shape
    parts = precision.shape[2]
    out = torch.empty(batch, heads, parts, tokens, dtype=torch.float32, device=values.device)
    every = batch * heads * parts
    chunk, splits = split_tokens(tokens, every, TILE)
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        distance_kernel[(every, splits)](
            values, mean, precision, out, tokens, chunk, heads, *values.stride()[:3], D=dim, BT=TILE, BD=BLOCK
        )
    return out.squeeze(2) if parts == 1 else out.sum(2)


def leverage(values: Tensor) -> Tensor:
    """Leverage of each token's value, ``[B, H, T]`` float32.

    Args:
        values: ``[B, H, T, D]``. Where a block is not finite, or all alike, every value's leverage by it is 1.
    """
    values = dense(values)
    return distances(values, *precision(values))
