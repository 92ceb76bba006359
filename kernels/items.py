"""Tokens in blocks on the GPU: a launch to set pinned ones apart, two for weights, one for widths of tokens.

Weights are summed in another order than by the twin, `naive_items`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import naive_items
from .items_kernels import block_sums_kernel, set_apart_kernel, shares_kernel, spread_kernel

TOKENS = 2048  # of a tile


def set_apart(token: Tensor, pinned: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `naive_items.set_apart`."""
    token, pinned = token.contiguous(), pinned.contiguous()
    problems, heads, tokens = token.shape
    weights, held = torch.empty_like(token), torch.empty_like(pinned)
    counts = torch.empty(problems, heads, dtype=torch.int64, device=token.device)
    with torch.cuda.device_of(token):  # type: ignore[no-untyped-call]
        set_apart_kernel[(problems * heads,)](
            token, pinned.view(torch.uint8), weights, held.view(torch.uint8), counts, tokens, min(most, tokens),
            BLOCK=TOKENS, num_warps=8,
        )  # fmt: skip
    return weights, held, counts


def block_weights(ranked: Tensor, block: int, pinned: bool) -> tuple[Tensor, Tensor]:
    """As `naive_items.block_weights`; ``ranked`` is contiguous."""
    if block & block - 1:  # not a power of two
        return naive_items.block_weights(ranked, block, pinned)
    problems, heads, tokens = ranked.shape
    n, part = -(-tokens // block), max(1, TOKENS // block)
    parts = -(-n // part)
    sums, weight, mass, totals = (
        torch.empty(problems, heads, size, dtype=torch.float64, device=ranked.device)
        for size in (n, n, n + 1, parts)
    )  # fmt: skip
    with torch.cuda.device_of(ranked):  # type: ignore[no-untyped-call]
        block_sums_kernel[(parts, problems * heads)](
            ranked, sums, totals, tokens, n, n * block - tokens, BLOCK=block, BN=part, PINNED=pinned
        )
        shares_kernel[(problems, heads)](sums, totals, weight, mass, n, parts * heads, BN=TOKENS, BP=128, num_warps=8)
    return weight, mass


def spread(boundary: Tensor, width: Tensor, order: Tensor, block: int, count: int) -> Tensor:
    """As `naive_items.spread`; all but ``width`` are contiguous."""
    problems, heads, tokens = order.shape
    bits = torch.empty(order.shape, dtype=torch.uint8, device=order.device)
    with torch.cuda.device_of(order):  # type: ignore[no-untyped-call]
        spread_kernel[(-(-tokens // 1024), problems * heads)](
            boundary, width, order, bits, tokens, block, count * block - tokens, *width.stride()[:2], heads,
            S=boundary.shape[2], BLOCK=1024,
        )  # fmt: skip
    return bits
