"""Kernels of `rotation`: values before they are packed, and what decoding makes of packed ones.

The first is the same sums in the same order as the twin; the second multiplies by the matrix on tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_codes_kernels import INTERPRETED, dot, split_high_low

_ROWS = tl.constexpr(16)  # channels at a time, the least that tensor cores take


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """``x`` float32 in ``dtype``, to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # which cuts off what bfloat16 has no room for
        raw = x.to(tl.int32, bitcast=True)
        raw = (raw + 0x7FFF + (raw >> 16 & 1)) & -65536
        x = tl.where(x == x, raw.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def rotate_kernel(
    values, out, T, stride_b, stride_h, stride_t,
    H: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, STEPS: tl.constexpr, FACTOR: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """``BT`` tokens of one row, ``SPAN`` channels of each."""
    row, first = tl.program_id(1), tl.program_id(2) * SPAN
    ti, di = tl.program_id(0) * BT + tl.arange(0, BT), first + tl.arange(0, SPAN)
    values += (row // H).to(tl.int64) * stride_b + (row % H).to(tl.int64) * stride_h
    held = (ti < T)[:, None]
    x = tl.load(values + ti.to(tl.int64)[:, None] * stride_t + di[None, :], mask=held, other=0.0).to(tl.float32)
    for _ in tl.static_range(STEPS):
        even, odd = tl.split(tl.reshape(x, [BT, SPAN // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), [BT, SPAN])
    at = (row.to(tl.int64) * T + ti)[:, None] * D + di[None, :]
    tl.store(out + at, _rounded(x * FACTOR, out.dtype.element_ty), mask=held)


@triton.jit
def store_restored(
    out_ptr, out, columns, FACTOR: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPAN: tl.constexpr
):
    """Store ``FACTOR H out`` for ``out`` ``[DP, N]`` float32, at ``columns`` ``[N]`` plus the channel; -1 for none."""
    # Two bfloat16 are as good as float32 next to the codes, and signs are exact.
    high, low = split_high_low(out, tl.bfloat16)
    ci = tl.arange(0, DP)
    for first in tl.range(0, D, _ROWS):
        ri = first + tl.arange(0, _ROWS)
        sign = _signs(ri, ci, SPAN)
        part = dot(sign, low, dot(sign, high, tl.zeros([_ROWS, N], tl.float32))) * FACTOR
        tl.store(out_ptr + columns[None, :] + ri[:, None], part, mask=(columns >= 0)[None, :] & (ri < D)[:, None])


@triton.jit
def _signs(row, column, SPAN: tl.constexpr):
    """Entries of the blocks' ``H``, ``[len(row), len(column)]`` bfloat16; 0 outside the blocks."""
    common = row[:, None] & column[None, :] & (SPAN - 1)
    common ^= common >> 8
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    together = row[:, None] // SPAN == column[None, :] // SPAN
    return tl.where(together, (1 - 2 * (common & 1)).to(tl.float32), 0.0).to(tl.bfloat16)
