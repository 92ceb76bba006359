"""The rotation of values in one launch on a GPU; `naive_rotation` says what it means."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .naive_rotation import exponents
from .rotation_kernels import rotate_kernel

TILE = 4096  # numbers of one program


def rotate(values: Tensor, span: int) -> Tensor:
    """`naive_rotation.rotate`, bit for bit, of ``values`` ``[B, H, T, D]``; the result is contiguous."""
    batch, heads, tokens, dim = values.shape
    if span == 1:
        return values
    values = values if values.stride(3) == 1 else values.contiguous()
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    rows = TILE // span
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        rotate_kernel[(triton.cdiv(tokens, rows), batch * heads, dim // span)](
            values, out, tokens, *values.stride()[:3],
            H=heads, D=dim, SPAN=span, FACTOR=2.0 ** -exponents(span)[0], BT=rows,
        )  # fmt: skip
    return out
