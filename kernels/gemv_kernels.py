"""Kernel of `gemv`: a weight matrix times one vector, at the speed at which memory gives the matrix.

    y = W x            x as it is, or its RMS norm
    r = r + W x
    y = silu(W1 x) * W2 x

Every program keeps the vector and goes through blocks of rows, always with the next tile asked for before the last one
is used. The first tile is asked for before the launch ahead has ended (programmatic dependent launch): weights do not
depend on it. Sums are float32; what transformers' modules round to the model's type is rounded here too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _tile(weight, block, chunk, first, N, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """``[BN, BK]`` of the rows of a block, counted from row ``first``; 0 beyond ``N`` rows and ``K`` columns."""
    n, k = block * BN + tl.arange(0, BN), chunk * BK + tl.arange(0, BK)
    at = (first + n).to(tl.int64)[:, None] * K + k[None, :]
    if K % BK == 0:
        return tl.load(weight + at, mask=(n < N)[:, None], other=0.0)
    return tl.load(weight + at, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def _vector(x, norm, scale, chunk, K: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr):
    """``[BK]`` float32 of the vector, or of its norm."""
    k = chunk * BK + tl.arange(0, BK)
    part = tl.load(x + k, mask=k < K, other=0.0)
    if NORM:
        w = tl.load(norm + k, mask=k < K, other=0.0)
        scaled = (part.to(tl.float32) * scale).to(w.dtype)
        part = (w.to(tl.float32) * scaled.to(tl.float32)).to(w.dtype)
    return part.to(tl.float32)


@triton.jit
def _sums(sums, bias, n, N, BIAS: tl.constexpr, dtype: tl.constexpr):
    """Sums of a block's rows ``n`` with their bias, rounded."""
    if BIAS:
        sums += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    return sums.to(dtype)


@triton.jit
def gemv_kernel(
    x, norm, eps, weight, bias, out, N,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of ``weight [N, K]`` (``[2 N, K]`` if gated) times ``x [K]``, into ``out [N]``."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    chunks: tl.constexpr = (K + BK - 1) // BK
    dtype: tl.constexpr = out.dtype.element_ty
    tile = _tile(weight, program, 0, 0, N, K, BN, BK)
    other = _tile(weight, program, 0, N, N, K, BN, BK) if GATED else tile
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    scale = 1.0
    if NORM:
        squares = tl.zeros([BK], tl.float32)
        for chunk in range(chunks):
            k = chunk * BK + tl.arange(0, BK)
            part = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
            squares += part * part
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    whole = _vector(x, norm, scale, 0, K, BK, NORM)
    for block in range(program, tl.cdiv(N, BN), programs):
        sums, others = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BK], tl.float32)
        for chunk in range(chunks):
            last = chunk == chunks - 1
            next_block, next_chunk = tl.where(last, block + programs, block), tl.where(last, 0, chunk + 1)
            after = _tile(weight, next_block, next_chunk, 0, N, K, BN, BK)
            part = whole if chunks == 1 else _vector(x, norm, scale, chunk, K, BK, NORM)
            sums += tile.to(tl.float32) * part[None, :]
            tile = after
            if GATED:
                after = _tile(weight, next_block, next_chunk, N, N, K, BN, BK)
                others += other.to(tl.float32) * part[None, :]
                other = after
        n = block * BN + tl.arange(0, BN)
        y = _sums(tl.sum(sums, 1), bias, n, N, BIAS, dtype)
        if GATED:
            gate, up = y.to(tl.float32), _sums(tl.sum(others, 1), bias + N, n, N, BIAS, dtype)
            silu = (gate / (1.0 + tl.exp(-gate))).to(dtype)
            y = (silu.to(tl.float32) * up.to(tl.float32)).to(dtype)
        if ADD:
            y = (tl.load(out + n, mask=n < N, other=0.0).to(tl.float32) + y.to(tl.float32)).to(dtype)
        tl.store(out + n, y, mask=n < N)
