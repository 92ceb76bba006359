"""Kernels of `leverage`: moments of values, the inverses of their covariances, and each value's distances by them."""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_codes_kernels import dot, split_high_low


@triton.jit
def _place(D: tl.constexpr, BD: tl.constexpr):
    """The head of a program, and the channels of its block."""
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    return tl.program_id(0).to(tl.int64) // BLOCKS, tl.program_id(0) % BLOCKS * BD + tl.arange(0, BD)


@triton.jit
def _load(values, t, ok, d, stride, D: tl.constexpr):
    """Values of tokens ``t``, ``[BT, BD]``; zeros where there are none."""
    at = values + t.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=ok[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def moments_kernel(
    values, sums, products, count, step, chunk, heads, splits, stride_b, stride_h, stride_t,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums of ``v`` and of ``v v^T`` in a block over a chunk of the sample, which is every ``step``-th token."""
    head, d = _place(D, BD)
    values += head // heads * stride_b + head % heads * stride_h
    split = tl.program_id(1)
    total = tl.zeros([BD], tl.float32)
    product = tl.zeros([BD, BD], tl.float32)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, count), BT):
        t = start + tl.arange(0, BT)
        v = _load(values, t * step, t < count, d, stride_t, D)
        total += tl.sum(v.to(tl.float32), 0)
        if values.dtype.element_ty == tl.float32:
            product = tl.dot(tl.trans(v), v, product, input_precision="ieee")
        else:
            product = dot(tl.trans(v), v, product)
    i, part = tl.arange(0, BD), tl.program_id(0).to(tl.int64) * splits + split
    tl.store(sums + part * BD + i, total)
    tl.store(products + part * BD * BD + i[:, None] * BD + i[None, :], product)


@triton.jit
def precision_kernel(
    sums, products, mean, out, count, splits, ridge, alike, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """A block's mean and the inverse of its covariance, whose diagonal is lifted by ``ridge`` of its mean.

    A block whose values are all ``alike`` has none: not a number.

    Gauss and Jordan's sweeps, in place, of the correlations, whose pivots are 1 at most. One update by ``u u^T`` sweeps
    a row, its column and the rest, if the pivot's entry of ``u`` is less by 1; it leaves 2 too much on the diagonal.
    """
    head, d = _place(D, BD)
    block, i = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    at = i[:, None] * BD + i[None, :]
    m = tl.zeros([BD], tl.float32)
    a = tl.zeros([BD, BD], tl.float32)
    for split in range(splits):
        part = block * splits + split
        m += tl.load(sums + part * BD + i)
        a += tl.load(products + part * BD * BD + at)
    m /= count
    a = a / count - m[:, None] * m[None, :]
    same = i[:, None] == i[None, :]
    variance = tl.sum(tl.where(same, a, 0.0), 1)
    spread = tl.sum(variance, 0)
    variance += ridge * spread / tl.sum((d < D).to(tl.float32), 0)
    variance = tl.where(spread <= alike * tl.sum(m * m, 0), float("nan"), variance)
    scale = tl.where(d < D, tl.rsqrt(variance), 1.0)
    a = tl.where(same, 1.0, a * (scale[:, None] * scale[None, :]))
    for k in range(BD):
        u = tl.sum(tl.where((i == k)[None, :], a, 0.0), 1)
        pivot = tl.sum(tl.where(i == k, u, 0.0), 0)
        u = tl.where(i == k, u - 1.0, u)
        a -= u[:, None] * (u / pivot)[None, :]
    a = tl.where(same, 2.0, 0.0) - a
    tl.store(mean + head * D + d, m, mask=d < D)
    tl.store(out + block * BD * BD + at, a * (scale[:, None] * scale[None, :]))


@triton.jit
def distance_kernel(
    values, mean, precision, out, tokens, chunk, heads, stride_b, stride_h, stride_t,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``(v - m)^T P (v - m) / D`` in a block of a chunk of a head's tokens, into ``out [B * H * N, T]``.

    With 16-bit values ``P`` is a sum of two matrices of their type, which tensor cores multiply exactly.
    """
    head, d = _place(D, BD)
    values += head // heads * stride_b + head % heads * stride_h
    block, i = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    m = tl.load(mean + head * D + d, mask=d < D, other=0.0)
    p = tl.load(precision + block * BD * BD + i[:, None] * BD + i[None, :])
    centre = tl.sum(m[:, None] * p, 0)
    largest = tl.max(tl.max(tl.abs(p), 1), 0)
    high, low = split_high_low(p / largest, values.dtype.element_ty)
    average = tl.sum((d < D).to(tl.float32), 0)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, tokens), BT):
        t = start + tl.arange(0, BT)
        v = _load(values, t, t < tokens, d, stride_t, D)
        if values.dtype.element_ty == tl.float32:
            y = tl.dot(v, p, input_precision="ieee")
        else:
            y = dot(v, high, dot(v, low, tl.zeros([BT, BD], tl.float32))) * largest
        h = tl.sum((y - centre[None, :]) * (v.to(tl.float32) - m[None, :]), 1)
        h = tl.where((h == h) & (h < float("inf")), tl.maximum(h, 0.0), average)
        tl.store(out + block * tokens + t, h / D, mask=t < tokens)
