"""Sums and differences of `naive_rotation`, for values before they are packed and for what decoding makes of them."""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_codes_kernels import INTERPRETED


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """``x`` float32 in ``dtype``, to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # which cuts off what bfloat16 has no room for
        raw = x.to(tl.int32, bitcast=True)
        raw = (raw + 0x7FFF + (raw >> 16 & 1)) & -65536
        x = tl.where(x == x, raw.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.constexpr_function
def _steps(span):
    """How often ``span`` halves."""
    return span.bit_length() - 1


@triton.jit
def turn(x, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """``H x`` of each of ``ROWS`` times ``SPAN`` numbers, in the order of the twin's sums."""
    y = tl.reshape(x, [ROWS, SPAN])
    for _ in tl.static_range(_steps(SPAN)):
        even, odd = tl.split(tl.reshape(y, [ROWS, SPAN // 2, 2]))
        y = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), [ROWS, SPAN])
    return tl.reshape(y, x.shape)


@triton.jit
def rotate_kernel(
    values, out, T, stride_b, stride_h, stride_t,
    H: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, FACTOR: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """``BT`` tokens of one row, ``SPAN`` channels of each."""
    row, first = tl.program_id(1), tl.program_id(2) * SPAN
    ti, di = tl.program_id(0) * BT + tl.arange(0, BT), first + tl.arange(0, SPAN)
    values += (row // H).to(tl.int64) * stride_b + (row % H).to(tl.int64) * stride_h
    held = (ti < T)[:, None]
    x = tl.load(values + ti.to(tl.int64)[:, None] * stride_t + di[None, :], mask=held, other=0.0).to(tl.float32)
    x = turn(x, BT, SPAN)
    at = (row.to(tl.int64) * T + ti)[:, None] * D + di[None, :]
    tl.store(out + at, _rounded(x * FACTOR, out.dtype.element_ty), mask=held)
