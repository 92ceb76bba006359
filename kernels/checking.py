"""The checks' questions to the GPU, a launch or two for each; the same as the twin's, `naive_checking`, bit for bit."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .checking_kernels import (
    plan_figures_kernel,
    plan_rows_kernel,
    score_figures_kernel,
    score_rows_kernel,
    sound_plan_kernel,
    sound_scores_kernel,
)
from .naive_checking import Prices

BLOCK = 2048  # numbers of a tile


def score_figures(token: Tensor, channel: Tensor) -> Tensor:
    """As `naive_checking.score_figures`, of ``[B, H, T]`` and ``[B, H, D]`` float32."""
    rows, tokens, dim = token.shape[0] * token.shape[1], token.shape[2], channel.shape[2]
    parts = torch.empty(4, rows, dtype=torch.float32, device=token.device)
    figures = torch.empty(4, dtype=torch.float64, device=token.device)
    with torch.cuda.device_of(token):  # type: ignore[no-untyped-call]
        score_rows_kernel[(rows,)](
            token.contiguous(), channel.contiguous(), parts, tokens, dim, BLOCK=2 * BLOCK, SMALL=256, num_warps=8
        )
        score_figures_kernel[(4,)](parts, figures, rows, BLOCK=256)
    return figures


def sound_scores(token: Tensor, channel: Tensor, figures: Tensor) -> tuple[Tensor, Tensor]:
    """As `naive_checking.sound_scores`."""
    token, channel = token.contiguous(), channel.contiguous()
    sound = torch.empty_like(token), torch.empty_like(channel)
    sizes = token.numel(), channel.numel()
    with torch.cuda.device_of(token):  # type: ignore[no-untyped-call]
        sound_scores_kernel[(-(-max(sizes) // BLOCK),)](token, channel, figures, *sound, *sizes, BLOCK=BLOCK)
    return sound


def plan_figures(
    value_bits: Tensor, key_bits: Tensor, pinned: Tensor, prices: Prices, each_head: bool, layers: int
) -> Tensor:
    """As `naive_checking.plan_figures`."""
    (batch, heads, tokens), dim = value_bits.shape, key_bits.shape[2]
    rows, kept = batch * heads, len(prices.values)
    plan = (t.contiguous().view(torch.uint8) for t in (value_bits, key_bits, pinned))
    tables = (prices.widths, prices.values, prices.layers, prices.channels, prices.value_odd, prices.key_odd)
    parts = torch.empty(5, rows, dtype=torch.int64, device=value_bits.device)
    figures = torch.empty(3 + layers, dtype=torch.float64, device=value_bits.device)
    with torch.cuda.device_of(value_bits):  # type: ignore[no-untyped-call]
        plan_rows_kernel[(rows,)](
            *plan, *tables, parts, tokens, dim, kept,
            prices.token_block, prices.key_block, prices.pinned_cost, prices.head_cost,
            CP=triton.next_power_of_2(kept + 2), DP=triton.next_power_of_2(dim), BT=BLOCK, num_warps=16,
        )  # fmt: skip
        plan_figures_kernel[(1,)](
            parts, figures, rows, heads, layers, prices.full_cost, RP=triton.next_power_of_2(rows), EACH_HEAD=each_head
        )
    return figures


def sound_plan(value_bits: Tensor, key_bits: Tensor, pinned: Tensor, figures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `naive_checking.sound_plan`."""
    value_bits, key_bits, pinned = (t.contiguous() for t in (value_bits, key_bits, pinned))
    value, key, held = (torch.empty_like(t) for t in (value_bits, key_bits, pinned))
    sizes = value.numel(), key.numel()
    with torch.cuda.device_of(value):  # type: ignore[no-untyped-call]
        sound_plan_kernel[(-(-max(sizes) // BLOCK),)](
            value_bits, key_bits, pinned.view(torch.uint8), figures, value, key, held.view(torch.uint8), *sizes,
            BLOCK=BLOCK,
        )  # fmt: skip
    return value, key, held
