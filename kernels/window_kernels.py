"""Kernels of `window`: a pass for log-sum-exps, a pass for moments, and the spread of the keys.

    lse_r = log sum_t 2^x_rt,   x_rt = scale * log2(e) * q_r k_t   for t up to the query's own position
    m_t   = max_r or sum_r of a_rt, or sum_r of a_rt^2,   a_rt = 2^(x_rt - lse_r)

``r`` runs over the ``G * W`` window queries of a KV head, in blocks that tensor cores like. Logits are
computed twice and stored never.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_codes_kernels import INTERPRETED

_SIZES = ["scale", "tokens", "chunk", "rows", "width", "heads", "splits"]  # no kernel of its own for each


@triton.jit
def _load_keys(keys, start, tokens, stride, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Keys of ``BT`` tokens, ``[BT, BD]``; zeros beyond the prompt and the head dimension."""
    t, d = tl.arange(0, BT), tl.arange(0, BD)
    at = keys + tl.cast(start, tl.int64) * stride + t[:, None] * stride + d[None, :]
    return tl.load(at, mask=(start + t < tokens)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _load_queries(queries, row, rows, width, stride_h, stride_t, D: tl.constexpr, BD: tl.constexpr):
    """Query rows ``g * W + w`` of a KV head, ``[BR, BD]``; zeros beyond the last."""
    d = tl.arange(0, BD)
    at = (row // width).to(tl.int64) * stride_h + (row % width) * stride_t
    return tl.load(queries + at[:, None] + d[None, :], mask=(row < rows)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _dot(a, b):
    """``a @ b^T`` in float32; tensor cores take 16-bit floats as they are."""
    if INTERPRETED:  # it would multiply the bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit(do_not_specialize=_SIZES)
def lse_kernel(
    queries, keys, partial, scale, tokens, chunk, rows, width, heads, splits,
    q_stride_b, q_stride_kv, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    D: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp to base 2 of a block of queries over a chunk of tokens, into ``partial [B * H, R, splits]``."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    head, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    keys += (head // heads) * k_stride_b + (head % heads) * k_stride_h
    queries += (head // heads) * q_stride_b + (head % heads) * q_stride_kv
    q = _load_queries(queries, row, rows, width, q_stride_h, q_stride_t, D, BD)  # [BR, BD]
    last = tokens - width + row % width  # the token that a query sits on
    top = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    first = split * chunk
    for start in tl.range(first, tl.minimum(first + chunk, tokens), BT, num_stages=STAGES):
        k = _load_keys(keys, start, tokens, k_stride_t, D, BT, BD)
        x = _dot(q, k) * scale  # [BR, BT]
        x = tl.where((start + tl.arange(0, BT))[None, :] <= last[:, None], x, float("-inf"))
        new = tl.maximum(top, tl.max(x, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: keep the differences from NaN
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(x - safe[:, None]), 1)
        top = new
    tl.store(partial + (head * rows + row) * splits + split, top + tl.log2(total), mask=row < rows)


@triton.jit(do_not_specialize=_SIZES)
def merge_lse_kernel(partial, lse, rows, splits, BR: tl.constexpr, BS: tl.constexpr):
    """Log-sum-exp over the chunks, ``lse [B * H * R]`` from ``partial [B * H * R, splits]``."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    top = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    for start in range(0, splits, BS):
        split = start + tl.arange(0, BS)
        inside = (row < rows)[:, None] & (split < splits)[None, :]
        x = tl.load(partial + row[:, None] * splits + split[None, :], mask=inside, other=float("-inf"))
        new = tl.maximum(top, tl.max(x, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(x - safe[:, None]), 1)
        top = new
    tl.store(lse + row, top + tl.log2(total), mask=row < rows)


@triton.jit(do_not_specialize=_SIZES)
def moment_kernel(
    queries, keys, lse, out, scale, tokens, chunk, rows, width, heads,
    q_stride_b, q_stride_kv, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    D: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, MOMENT: tl.constexpr,
):  # fmt: skip
    """Moment of a block of queries' attention to a chunk of tokens, into ``out [blocks, B * H, T]``."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    head, first = tl.program_id(1).to(tl.int64), tl.program_id(2) * chunk
    keys += (head // heads) * k_stride_b + (head % heads) * k_stride_h
    queries += (head // heads) * q_stride_b + (head % heads) * q_stride_kv
    q = _load_queries(queries, row, rows, width, q_stride_h, q_stride_t, D, BD)  # [BR, BD]
    last = tokens - width + row % width  # the token that a query sits on
    z = tl.load(lse + head * rows + row, mask=row < rows, other=1e30)  # no attention of rows beyond the last
    broken = tl.sum(0.0 * z, 0)  # NaN if a query attends to NaN, which a maximum would pass over
    out += (tl.program_id(0) * tl.num_programs(1) + head) * tokens
    for start in tl.range(first, tl.minimum(first + chunk, tokens), BT, num_stages=STAGES):
        t = start + tl.arange(0, BT)
        k = _load_keys(keys, start, tokens, k_stride_t, D, BT, BD)
        # Queries lie along the second dimension, where a reduction stays within a few lanes.
        if q.dtype == tl.float32:  # the other way round the compiler would hold all of q in registers
            x = tl.trans(_dot(q, k))
        else:
            x = _dot(k, q)  # [BT, BR]
        a = tl.exp2(x * scale - z[None, :])
        a = tl.where(t[:, None] <= last[None, :], a, 0.0)
        if MOMENT == "max":
            moment = tl.max(a, 1) + broken
        elif MOMENT == "square":
            moment = tl.sum(a * a, 1)
        else:
            moment = tl.sum(a, 1)
        tl.store(out + t, moment, mask=t < tokens)


@triton.jit(do_not_specialize=_SIZES)
def spread_kernel(
    keys, partial, tokens, chunk, heads, splits, k_stride_b, k_stride_h, k_stride_t,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of a chunk of keys, into ``partial [B * H, splits, 2, D]``.

    Every lane of the tile keeps its own running mean (Welford), so that a large common offset cancels nothing.
    """
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    keys += (head // heads) * k_stride_b + (head % heads) * k_stride_h
    t, d = tl.arange(0, BT), tl.arange(0, BD)
    mean = tl.zeros([BT, BD], tl.float32)
    square = tl.zeros([BT, BD], tl.float32)
    first = split * chunk
    last = tl.minimum(first + chunk, tokens)
    seen = 0.0
    for start in tl.range(first, last, BT, num_stages=3):
        seen += 1.0
        x = _load_keys(keys, start, tokens, k_stride_t, D, BT, BD).to(tl.float32)
        delta = tl.where((start + t < last)[:, None], x - mean, 0.0)
        mean += delta * (1.0 / seen)
        square += tl.where((start + t < last)[:, None], delta * (x - mean), 0.0)
    count = tl.maximum((last - first - t + BT - 1) // BT, 0).to(tl.float32)[:, None]  # tokens of each lane
    middle = tl.sum(mean * count, 0) / (last - first)
    deviation = mean - middle[None, :]
    out = partial + (head * splits + split) * 2 * D + d
    tl.store(out, middle, mask=d < D)
    tl.store(out + D, tl.sum(square + count * deviation * deviation, 0), mask=d < D)


@triton.jit(do_not_specialize=_SIZES)
def merge_spread_kernel(
    partial, out, tokens, chunk, heads, splits, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr
):
    """Mean and variance over all chunks, into ``out [2, B * H, D]``; ``heads`` is ``B * H``."""
    head = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, BS), tl.program_id(1) * BD + tl.arange(0, BD)
    partial += head * splits * 2 * D
    total = tl.zeros([BS, BD], tl.float32)
    for start in range(0, splits, BS):
        count = tl.maximum(tl.minimum(tokens - (start + s) * chunk, chunk), 0).to(tl.float32)[:, None]
        at = partial + (start + s)[:, None] * 2 * D + d[None, :]
        total += count * tl.load(at, mask=(start + s < splits)[:, None] & (d < D)[None, :], other=0.0)
    mean = tl.sum(total, 0) / tokens
    total = tl.zeros([BS, BD], tl.float32)
    for start in range(0, splits, BS):
        count = tl.maximum(tl.minimum(tokens - (start + s) * chunk, chunk), 0).to(tl.float32)[:, None]
        at = partial + (start + s)[:, None] * 2 * D + d[None, :]
        inside = (start + s < splits)[:, None] & (d < D)[None, :]
        deviation = tl.load(at, mask=inside, other=0.0) - mean[None, :]
        total += tl.load(at + D, mask=inside, other=0.0) + count * deviation * deviation
    tl.store(out + head * D + d, mean, mask=d < D)
    tl.store(out + (heads + head) * D + d, tl.sum(total, 0) / tokens, mask=d < D)
