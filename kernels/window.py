"""What the window's queries attend to and how the keys spread, on the GPU; `naive_window` says what it means.

Memory beyond inputs and outputs: at most ``PROGRAMS`` log-sum-exps for each of 128 rows or statistics for each
channel (1 MiB or less) and 8 bytes for every query. Where a KV head has more than 128 queries, each 128 have moments
of their own, ``[B, H, T]`` float32, before they are joined; nothing of ``[H, W, T]`` exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from .naive import LOG2_E
from .naive_window import Moment
from .window_kernels import lse_kernel, merge_lse_kernel, merge_spread_kernel, moment_kernel, spread_kernel

PROGRAMS = 512  # of a launch, about: some for each multiprocessor of any GPU
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Tile:
    """Compile-time shape of the attention kernels: rows of queries, tokens, padded head dimension, loads ahead."""

    rows: int
    tokens: int
    dim: int
    stages: int
    warps: int

    @classmethod
    def of(cls, rows: int, dim: int, dtype: torch.dtype) -> Tile:
        """The shape for ``rows`` queries of a KV head; float32 has no tensor cores and wants small tiles."""
        small, width = dtype == torch.float32, max(16, triton.next_power_of_2(dim))
        wide = width > 128
        return cls(
            rows=min(32 if small else 128, max(16, triton.next_power_of_2(rows))),
            tokens=32 if small else 64,
            dim=width,
            stages=2 if wide else 3,
            warps=8 if wide else 4,
        )


def token_moments(queries: Tensor, keys: Tensor, scale: float, moment: Moment) -> Tensor:
    """``max a``, ``sum a`` or ``sum a^2`` of each token over the group and the window; three launches.

    Args:
        queries: ``[B, H, G, W, D]``, of the type of the keys.
        keys: ``[B, H, T, D]``, ``T >= W``, of a type in ``DTYPES``.
        scale: factor of the logits.

    Returns:
        ``[B, H, T]`` float32; NaN for every token of a KV head whose queries or keys do not give finite logits.
    """
    queries, keys = dense(queries), dense(keys)
    batch, heads, groups, width, dim = queries.shape
    tokens, rows, every = keys.shape[2], groups * width, batch * heads
    tile = Tile.of(rows, dim, keys.dtype)
    blocks = -(-rows // tile.rows)
    chunk, splits = split_tokens(tokens, every * blocks, tile.tokens)
    new = partial(torch.empty, dtype=torch.float32, device=keys.device)
    parts, lse, out = new(every * rows, splits), new(every * rows), new(blocks, batch, heads, tokens)
    grid, factor = (blocks, every, splits), scale * LOG2_E
    sizes = (factor, tokens, chunk, rows, width, heads)
    strides = (*queries.stride()[:4], *keys.stride()[:3])
    shape = {"D": dim, "BR": tile.rows, "BT": tile.tokens, "BD": tile.dim, "STAGES": tile.stages}
    with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call]
        lse_kernel[grid](queries, keys, parts, *sizes, splits, *strides, **shape, num_warps=tile.warps)
        merge_lse_kernel[(-(-every * rows // 16),)](parts, lse, every * rows, splits, BR=16, BS=64)
        moment_kernel[grid](queries, keys, lse, out, *sizes, *strides, **shape, MOMENT=moment, num_warps=tile.warps)
    if blocks == 1:
        return out[0]
    return out.amax(0) if moment == "max" else out.sum(0)


def key_statistics(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over the tokens, in two launches.

    Args:
        keys: ``[B, H, T, D]``, of a type in ``DTYPES``.

    Returns:
        Both ``[B, H, D]`` float32.
    """
    keys = dense(keys)
    batch, heads, tokens, dim = keys.shape
    width, every = max(16, triton.next_power_of_2(dim)), batch * heads
    lanes = 32 if width <= 128 else 16  # tokens of a tile
    chunk, splits = split_tokens(tokens, every, lanes)
    parts = torch.empty(every, splits, 2, dim, dtype=torch.float32, device=keys.device)
    out = torch.empty(2, batch, heads, dim, dtype=torch.float32, device=keys.device)
    with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call]
        spread_kernel[(every, splits)](
            keys, parts, tokens, chunk, heads, splits, *keys.stride()[:3], D=dim, BT=lanes, BD=width
        )
        merge_spread_kernel[(every, -(-dim // 32))](parts, out, tokens, chunk, every, splits, D=dim, BS=32, BD=32)
    return out[0], out[1]


def split_tokens(tokens: int, others: int, tile: int) -> tuple[int, int]:
    """Tokens of a program, whole tiles, and the programs that this makes along the prompt."""
    wanted = max(1, PROGRAMS // others)
    chunk = -(-tokens // (wanted * tile)) * tile
    return chunk, -(-tokens // chunk)


def dense(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last dimension is strided."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
