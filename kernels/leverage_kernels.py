"""Kernels of `leverage`: second moments of values, the inverse of their covariance, and each value's distance by it."""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_codes_kernels import dot, split_high_low


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
    """Sums of ``v`` and of ``v v^T`` over a chunk of the sample, which is every ``step``-th token."""
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    values += head // heads * stride_b + head % heads * stride_h
    d, e = tl.arange(0, BD), tl.arange(0, BD)
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
    at = head * splits + split
    tl.store(sums + at * D + d, total, mask=d < D)
    inside = (d < D)[:, None] & (e < D)[None, :]
    tl.store(products + at * D * D + d[:, None] * D + e[None, :], product, mask=inside)


@triton.jit
def precision_kernel(
    sums, products, mean, out, count, splits, ridge, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """A head's mean and the inverse of its covariance, whose diagonal is lifted by ``ridge`` of its mean.

    Gauss and Jordan's sweeps, in place, of the correlations, whose pivots are 1 at most. One update by ``u u^T`` sweeps
    a row, its column and the rest, if the pivot's entry of ``u`` is less by 1; it leaves 2 too much on the diagonal.
    """
    head = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, BD), tl.arange(0, BD)
    inside = (i < D)[:, None] & (j < D)[None, :]
    at = i[:, None] * D + j[None, :]
    m = tl.zeros([BD], tl.float32)
    a = tl.zeros([BD, BD], tl.float32)
    for split in range(splits):
        part = head * splits + split
        m += tl.load(sums + part * D + i, mask=i < D, other=0.0)
        a += tl.load(products + part * D * D + at, mask=inside, other=0.0)
    m /= count
    a = a / count - m[:, None] * m[None, :]
    same = i[:, None] == j[None, :]
    variance = tl.sum(tl.where(same, a, 0.0), 1)
    variance += ridge * tl.sum(variance, 0) / D
    scale = tl.where(i < D, tl.rsqrt(variance), 1.0)
    a = tl.where(same, 1.0, a * (scale[:, None] * scale[None, :]))
    for k in range(D):
        u = tl.sum(tl.where((j == k)[None, :], a, 0.0), 1)
        pivot = tl.sum(tl.where(i == k, u, 0.0), 0)
        u = tl.where(i == k, u - 1.0, u)
        a -= u[:, None] * (u / pivot)[None, :]
    a = tl.where(same, 2.0, 0.0) - a
    tl.store(mean + head * D + i, m, mask=i < D)
    tl.store(out + head * D * D + at, a * (scale[:, None] * scale[None, :]), mask=inside)


@triton.jit
def distance_kernel(
    values, mean, precision, out, tokens, chunk, heads, stride_b, stride_h, stride_t,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``(v - m)^T P (v - m) / D`` of a chunk of a head's tokens, into ``out [B * H, T]``.

    With 16-bit values ``P`` is a sum of two matrices of their type, which tensor cores multiply exactly.
    """
    head = tl.program_id(0).to(tl.int64)
    values += head // heads * stride_b + head % heads * stride_h
    d, e = tl.arange(0, BD), tl.arange(0, BD)
    m = tl.load(mean + head * D + d, mask=d < D, other=0.0)
    at = head * D * D + d[:, None] * D + e[None, :]
    p = tl.load(precision + at, mask=(d < D)[:, None] & (e < D)[None, :], other=0.0)
    centre = tl.sum(m[:, None] * p, 0)
    largest = tl.max(tl.max(tl.abs(p), 1), 0)
    high, low = split_high_low(p / largest, values.dtype.element_ty)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, tokens), BT):
        t = start + tl.arange(0, BT)
        v = _load(values, t, t < tokens, d, stride_t, D)
        if values.dtype.element_ty == tl.float32:
            y = tl.dot(v, p, input_precision="ieee")
        else:
            y = dot(v, high, dot(v, low, tl.zeros([BT, BD], tl.float32))) * largest
        h = tl.sum((y - centre[None, :]) * (v.to(tl.float32) - m[None, :]), 1) / D
        h = tl.where((h == h) & (h < float("inf")), tl.maximum(h, 0.0), 1.0)
        tl.store(out + head * tokens + t, h, mask=t < tokens)
