"""What a plan gave to whom, small enough for a line of results: a histogram, and two maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rdkv import BitPlan

BINS = 32  # of the prompt, in the map of layers and positions


def bit_maps(plans: Sequence[BitPlan]) -> list[dict[str, Any]]:
    """For each sequence of a batch, from the plan of every layer.

    Returns:
        ``value_bits`` and ``key_bits``, the share of tokens and of channels at each width, pinned tokens as
        ``pinned``; ``heads``, the mean value bits of a token for every layer and head, ``[L][H]``; and ``positions``,
        the same for every layer and each of `BINS` equal parts of the prompt, ``[L][BINS]``.
    """
    bits = [plan.value_bits.masked_fill(plan.pinned, 16).float() for plan in plans]
    heads = torch.stack([part.mean(-1) for part in bits], 1)  # [B, L, H]
    positions = torch.stack([_binned(part.mean(1)) for part in bits], 1)  # [B, L, BINS]
    rows = range(len(heads))
    return [
        {
            "value_bits": _shares([_widths(plan, row) for plan in plans]),
            "key_bits": _shares([plan.key_bits[row] for plan in plans]),
            "heads": _rounded(heads[row]),
            "positions": _rounded(positions[row]),
        }
        for row in rows
    ]


PINNED = 255  # stands for pinned among the widths, which are 16 at most


def _widths(plan: BitPlan, row: int) -> Tensor:
    return plan.value_bits[row].masked_fill(plan.pinned[row], PINNED)


def _shares(parts: Sequence[Tensor]) -> dict[str, float]:
    widths, counts = torch.unique(torch.cat([part.flatten() for part in parts]), return_counts=True)
    total = int(counts.sum())
    names = ["pinned" if width == PINNED else str(width) for width in widths.tolist()]
    return {name: round(count / total, 6) for name, count in zip(names, counts.tolist(), strict=True)}


def _binned(tokens: Tensor) -> Tensor:
    """Means ``[B, BINS]`` over equal parts of ``[B, T]``."""
    return torch.nn.functional.adaptive_avg_pool1d(tokens, BINS)


def _rounded(table: Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in row] for row in table.tolist()]
