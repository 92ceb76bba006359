"""Which tokens a plan keeps, listed on the GPU in three launches."""

from __future__ import annotations

import torch
from torch import Tensor

from .positions_kernels import count_kernel, fold_kernel, list_kernel

SPAN = 1024  # tokens of a program


def listed(bits: Tensor, pinned: Tensor, kept_total: int, pinned_total: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `naive_positions.listed`, bit for bit."""
    (rows, tokens), device = bits.shape, bits.device
    bits, pinned = bits.contiguous(), pinned.contiguous().view(torch.uint8)
    spans, mask_bytes, folded_bytes = -(-tokens // SPAN), -(-tokens // 8), -(-kept_total // 4)
    mask = torch.empty(rows, mask_bytes, dtype=torch.uint8, device=device)
    counts = torch.empty(2, rows * spans, dtype=torch.int32, device=device)
    classes = torch.empty(kept_total, dtype=torch.uint8, device=device)
    folded = torch.empty(folded_bytes, dtype=torch.uint8, device=device)
    places = torch.empty(pinned_total, dtype=torch.int32, device=device)
    with torch.cuda.device_of(bits):  # type: ignore[no-untyped-call]
        count_kernel[(spans, rows)](bits, pinned, counts, mask, tokens, mask_bytes, SPAN=SPAN)
        list_kernel[(spans, rows)](
            bits, pinned, counts, classes, places, tokens, kept_total, pinned_total, SPAN=SPAN, BC=256
        )
        if folded_bytes:
            fold_kernel[(-(-folded_bytes // 1024),)](classes, folded, folded_bytes, kept_total, BLOCK=1024)
    return mask, folded, places
