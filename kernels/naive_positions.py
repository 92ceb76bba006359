"""The meaning of `positions` in plain PyTorch: which tokens a plan keeps, and at what width."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import naive

VALUE_CLASSES = (16, 8, 4, 2)  # widths by their 2-bit code


def listed(bits: Tensor, pinned: Tensor, kept_total: int, pinned_total: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a plan keeps, in a bit for each token, 2 for each one kept, 32 for each one pinned.

    Args:
        bits, pinned: ``[R, T]`` uint8 and bool.
        kept_total, pinned_total: how many tokens of all rows are kept without being pinned, and pinned.

    Returns:
        ``[R, ceil(T / 8)]`` uint8, kept tokens that are not pinned; ``[ceil(kept_total / 4)]`` uint8, their classes in
        order of row and position; ``[pinned_total]`` int32, positions of pinned tokens, likewise.
    """
    kept = bits.masked_fill(pinned, 0) > 0
    widths = bits[kept.nonzero_static(size=kept_total).unbind(1)]
    return (
        naive.pack_bits(kept.view(torch.uint8), 1),
        naive.pack_bits(_class_of(bits.device)[widths.int()], 2),
        pinned.nonzero_static(size=pinned_total)[:, 1].int(),
    )


@cache
def _class_of(device: torch.device) -> Tensor:
    """``[17]`` uint8, by width. Made once: while it is sent to a GPU the GPU is waited for."""
    table = torch.zeros(VALUE_CLASSES[0] + 1, dtype=torch.uint8)
    table[list(VALUE_CLASSES)] = torch.arange(len(VALUE_CLASSES), dtype=torch.uint8)
    return table.to(device)
