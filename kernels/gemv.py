"""Products of one vector with the small operations around them, one launch each; `naive_gemv` says what they are.

A batch of one sequence decodes at the speed at which memory gives the weights. A launch of its own for each norm, sum
and activation would leave memory idle in between. None of these waits for the device; all may be captured in a graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .device import launches_early, processors
from .gemv_kernels import gemv_kernel


class Shape(NamedTuple):
    """Compile-time shape of a product.

    Attributes:
        rows, columns: of a tile; more columns than the matrix has are cut to the next power of two. Of a gated product
            a program has two tiles at once, of half as many rows each.
        warps: warps of a program.
        resident: programs of a multiprocessor.
    """

    rows: int
    columns: int
    warps: int
    resident: int


NARROW, WIDE = Shape(4, 4096, 8, 2), Shape(4, 2048, 4, 3)  # of up to 4,096 columns, and of more; fastest on an H100


def norm_gemv(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None, shape: Shape | None = None
) -> Tensor:
    """As `naive_gemv.norm_gemv`; all are contiguous."""
    out = torch.empty(1, weight.shape[0], dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, shape, norm=norm, eps=eps)
    return out


def gated_gemv(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None, shape: Shape | None = None
) -> Tensor:
    """As `naive_gemv.gated_gemv`; all are contiguous."""
    out = torch.empty(1, weight.shape[0] // 2, dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, shape, norm=norm, eps=eps, gated=True)
    return out


def add_gemv(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, shape: Shape | None = None
) -> None:
    """As `naive_gemv.add_gemv`; all are contiguous."""
    _launch(x, weight, bias, residual, shape, add=True)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    shape: Shape | None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add: bool = False,
) -> None:
    if not (x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()):
        raise ValueError("a product takes contiguous tensors; call contiguous() on them")
    rows, columns = out.shape[1], weight.shape[1]
    rows_of_tile, most, warps, resident = shape or (NARROW if columns <= NARROW.columns else WIDE)
    if gated:
        rows_of_tile = max(1, rows_of_tile // 2)
    early = launches_early(x.device)
    options = {"launch_pdl": True} if early else {}
    programs = min(triton.cdiv(rows, rows_of_tile), processors(x.device) * resident)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        gemv_kernel[(programs,)](
            x, x if norm is None else norm, eps, weight, x if bias is None else bias, out, rows,
            K=columns, BN=rows_of_tile, BK=min(most, triton.next_power_of_2(columns)),
            NORM=norm is not None, GATED=gated, ADD=add, BIAS=bias is not None, PDL=early,
            num_warps=warps, num_stages=1, **options,
        )  # fmt: skip
