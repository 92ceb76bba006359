"""Decode attention straight from packed codes: one launch over every zone of the cache, one that merges.

    o = sum_t p_t v_t / sum_t p_t,    p_t = 2^(x_t - max x),    x_t = scale * log2(e) * q k_t

A key is ``zero_c + scale_c * code``, its code a sum of 2-bit planes ``4^k``; a value ``zero_t + scale_t * code``.
So the query takes the scales of the keys (one column of the codes is one channel and plane), the probabilities
take those of the values, and tensor cores multiply the codes themselves (`decode_codes_kernels`), plane by plane.

`naive_decode.attend` is the same in plain PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode_codes_kernels import (
    accumulate,
    across,
    dot,
    fold_query,
    hide,
    key_words,
    load_affine,
    load_query,
    multiply,
    split_high_low,
    upper,
    value_words,
    weigh,
    zero_of,
)
from .decode_plan import PACKED_ZONE, PINNED_ZONE
from .packed import CODED4, CODED8, CODED16, COLUMNS, KEY_EXPONENT, TOKENS, VALUE_EXPONENT

_N, _N4, _N8, _N16 = (tl.constexpr(i) for i in (TOKENS, CODED4, CODED8, CODED16))
_C, _KE, _VE = (tl.constexpr(i) for i in (COLUMNS, KEY_EXPONENT, VALUE_EXPONENT))
_PACKED, _PINNED = tl.constexpr(PACKED_ZONE), tl.constexpr(PINNED_ZONE)


@triton.jit
def _packed_zone(
    q_ptr, q_stride_h, q_stride_q, key_codes, key_columns, key_affine, value_codes, value_affine,
    counts, starts, row, begin, end, logit_scale,
    NQ: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, MANY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tiles ``begin`` to ``end`` of ``8 * W`` slots each: output sums ``[DP, N]``, maxima and sums ``[N]``."""
    n, n4 = tl.load(counts + row * 8 + _N), tl.load(counts + row * 8 + _N4)
    n8, n16 = tl.load(counts + row * 8 + _N8), tl.load(counts + row * 8 + _N16)
    C = tl.multiple_of(tl.load(counts + row * 8 + _C), 16)
    key_exponent = tl.load(counts + row * 8 + _KE).to(tl.float32)
    value_exponent = tl.load(counts + row * 8 + _VE).to(tl.float32)
    blocks, blocks4, blocks8, blocks16 = (n + 15) // 16, (n4 + 15) // 16, (n8 + 15) // 16, (n16 + 15) // 16
    key_codes += tl.multiple_of(tl.load(starts + row * 5), 16)
    value_codes += tl.multiple_of(tl.load(starts + row * 5 + 1), 16 if D % 8 == 0 else 2)
    key_columns += tl.multiple_of(tl.load(starts + row * 5 + 2), 16)
    value_affine += tl.load(starts + row * 5 + 3)
    key_affine += row * D  # float16 pairs
    if PDL:
        gdc_wait()  # the query is made by the launch before this one

    wi, ni, di, d2 = tl.arange(0, W), tl.arange(0, N), tl.arange(0, DP), tl.arange(0, 2 * DP)
    q = load_query(q_ptr, ni, di, q_stride_h, q_stride_q, NQ, Q, D).to(tl.float32)  # [DP, N]
    top_q = tl.max(tl.abs(q), 0)  # [N]
    zero = zero_of(tl.load(key_affine + di, mask=di < D, other=0))
    bias = tl.sum(q * zero[:, None], 0) * logit_scale  # [N]
    # Folded queries stay below 2^14, weighted probabilities too: float16 keeps its precision down to 2^-28 of that.
    fold = tl.where(top_q > 0, 16384.0 / top_q, 0.0)
    unit = top_q * tl.exp2(key_exponent + 10.0) * logit_scale  # 2^24 of the subnormal codes over 2^14
    u0, u1, u2, u3 = unit, unit * 0.25, unit * 0.0625, unit * 0.015625
    q_at = (ni // Q) * q_stride_h + (ni % Q) * q_stride_q

    acc = tl.zeros([DP, N], tl.float32)
    zeros = tl.zeros([W, N], tl.float32)  # summed over words only at the end
    total = tl.zeros([W, N], tl.float32)
    top = tl.full([N], float("-inf"), tl.float32)
    key_scale = tl.exp2(-key_exponent)
    factor = tl.exp2(14.0 - value_exponent)
    value_unit = tl.exp2(value_exponent + 10.0)
    one = (n > 0).to(tl.float16)
    norm = fold * key_scale
    ca, cb = tl.arange(0, CA), CA + tl.arange(0, CB)
    f = fold_query(q_ptr, q_at, key_columns, key_affine, norm, ni, ca, C, NQ)
    g = fold_query(q_ptr, q_at, key_columns, key_affine, norm, ni, cb, C, NQ)
    for tile in tl.range(begin, end):
        word = tile * W + wi
        slot = word * 8
        pair = tile * (W // 2) + tl.arange(0, W // 2)
        w = key_words(key_codes, word, ca, n, C)
        if CB <= 32:  # more would not fit into the registers beside the first
            more = key_words(key_codes, word, cb, n, C)
        s0 = tl.zeros([W, N], tl.float32)
        s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
        s0, s1, s2, s3 = multiply(w, f, s0, s1, s2, s3)
        s4, s5, s6, s7 = multiply(upper(w), f, s4, s5, s6, s7)
        if CB > 32:
            more = key_words(key_codes, word, cb, n, C)
        s0, s1, s2, s3 = multiply(more, g, s0, s1, s2, s3)
        s4, s5, s6, s7 = multiply(upper(more), g, s4, s5, s6, s7)
        if MANY:
            ce = CA + CB + tl.arange(0, 64)
            for c in range(0, C - CA - CB, 64):  # more columns than folded queries are kept for
                extra = key_words(key_codes, word, c + ce, n, C)
                h = fold_query(q_ptr, q_at, key_columns, key_affine, norm, ni, c + ce, C, NQ)
                s0, s1, s2, s3 = multiply(extra, h, s0, s1, s2, s3)
                s4, s5, s6, s7 = multiply(upper(extra), h, s4, s5, s6, s7)

        # What follows the logits is loaded before their maximum is known.
        lowest = value_words(value_codes, pair, d2, blocks, D)
        e0, e1 = load_affine(value_affine, slot, n, 0), load_affine(value_affine, slot, n, 1)
        e2, e3 = load_affine(value_affine, slot, n, 2), load_affine(value_affine, slot, n, 3)
        e4, e5 = load_affine(value_affine, slot, n, 4), load_affine(value_affine, slot, n, 5)
        e6, e7 = load_affine(value_affine, slot, n, 6), load_affine(value_affine, slot, n, 7)
        if (tile + 1) * W * 8 > n:
            s0, s1, s2, s3 = hide(s0, slot, n, 0), hide(s1, slot, n, 1), hide(s2, slot, n, 2), hide(s3, slot, n, 3)
            s4, s5, s6, s7 = hide(s4, slot, n, 4), hide(s5, slot, n, 5), hide(s6, slot, n, 6), hide(s7, slot, n, 7)
        x0, x1 = tl.maximum(s0, s4), tl.maximum(s1, s5) * 0.25
        x2, x3 = tl.maximum(s2, s6) * 0.0625, tl.maximum(s3, s7) * 0.015625
        x = tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), 0)
        new = tl.maximum(top, x * u0)  # without the bias
        shrink = tl.exp2(top - new)
        top = new
        p0, p4 = tl.exp2(s0 * u0[None, :] - top[None, :]), tl.exp2(s4 * u0[None, :] - top[None, :])
        p1, p5 = tl.exp2(s1 * u1[None, :] - top[None, :]), tl.exp2(s5 * u1[None, :] - top[None, :])
        p2, p6 = tl.exp2(s2 * u2[None, :] - top[None, :]), tl.exp2(s6 * u2[None, :] - top[None, :])
        p3, p7 = tl.exp2(s3 * u3[None, :] - top[None, :]), tl.exp2(s7 * u3[None, :] - top[None, :])
        total = total * shrink[None, :] + (((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7)))
        acc *= shrink[None, :]
        zeros *= shrink[None, :]
        a0, zeros = weigh(p0, e0, factor, zeros)
        a1, zeros = weigh(p1, e1, factor * 0.25, zeros)
        a2, zeros = weigh(p2, e2, factor * 0.0625, zeros)
        a3, zeros = weigh(p3, e3, factor * 0.015625, zeros)
        a4, zeros = weigh(p4, e4, factor, zeros)
        a5, zeros = weigh(p5, e5, factor * 0.25, zeros)
        a6, zeros = weigh(p6, e6, factor * 0.0625, zeros)
        a7, zeros = weigh(p7, e7, factor * 0.015625, zeros)

        v = across(lowest, W, DP)
        part = accumulate(v, a0, a1, a2, a3, tl.zeros([DP, N], tl.float32))
        part = accumulate(upper(v), a4, a5, a6, a7, part)
        first = tile * W * 8
        plane = value_codes + blocks.to(tl.int64) * (2 * D)
        held, weight = blocks4, 4.0
        for i in range(1, tl.where(first < n16, 8, tl.where(first < n8, 4, tl.where(first < n4, 2, 1)))):
            # Weights that the loop changes (here: times one) are not kept in registers as operands all along.
            a0, a1, a2, a3, a4, a5, a6, a7 = (
                a0 * one,
                a1 * one,
                a2 * one,
                a3 * one,
                a4 * one,
                a5 * one,
                a6 * one,
                a7 * one,
            )
            v = across(value_words(plane, pair, d2, held, D), W, DP)
            higher = accumulate(v, a0, a1, a2, a3, tl.zeros([DP, N], tl.float32))
            part += accumulate(upper(v), a4, a5, a6, a7, higher) * weight
            weight *= 4.0
            plane += held.to(tl.int64) * (2 * D)
            held = tl.where(i < 3, blocks8, blocks16)
        acc += part * value_unit
    return acc + tl.sum(zeros, 0)[None, :], top + bias, tl.sum(total, 0)


@triton.jit
def _raw_zone(
    q_ptr, q_stride_h, q_stride_q, keys, values, stride, begin, end, logit_scale,
    NQ: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """16-bit tokens ``begin`` to ``end``: output sums ``[DP, N]``, maxima and sums ``[N]``."""
    if PDL:
        gdc_wait()
    ni, di, ti = tl.arange(0, N), tl.arange(0, DP), tl.arange(0, BT)
    q = load_query(q_ptr, ni, di, q_stride_h, q_stride_q, NQ, Q, D).to(keys.dtype.element_ty)  # [DP, N]
    acc = tl.zeros([DP, N], tl.float32)
    total = tl.zeros([N], tl.float32)
    top = tl.full([N], float("-inf"), tl.float32)
    for start in range(begin, end, BT):
        ok = start + ti < end
        at = (start + ti).to(tl.int64)[:, None] * stride + di[None, :]
        mask = ok[:, None] & (di < D)[None, :]
        k = tl.load(keys + at, mask=mask, other=0.0)  # [BT, DP]
        s = tl.where(ok[:, None], dot(k, q, tl.zeros([BT, N], tl.float32)) * logit_scale, float("-inf"))  # [BT, N]
        new = tl.maximum(top, tl.max(s, 0))
        shrink = tl.exp2(top - new)
        top = new
        p = tl.exp2(s - top[None, :])
        total = total * shrink + tl.sum(p, 0)
        v = tl.load(values + at, mask=mask, other=0.0)
        high, low = split_high_low(p, v.dtype)
        v = tl.trans(v)
        acc = dot(v, low, dot(v, high, acc * shrink[None, :]))
    return acc, top, total


@triton.jit
def attend_kernel(
    q_ptr, q_stride_b, q_stride_h, q_stride_q,
    key_codes, key_columns, key_affine, value_codes, value_affine, pinned_keys, pinned_values,
    counts, starts, tail_keys, tail_values, tail_stride_b, tail_stride_h, tail_stride_t, tail_lengths,
    items, outputs, lses, logit_scale,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, MANY: tl.constexpr,
    BT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One work item: some tiles of a row's packed zone, or some tokens of one of its 16-bit zones."""
    pid = tl.program_id(0)
    row = tl.load(items + pid * 4).to(tl.int64)
    zone = tl.load(items + pid * 4 + 1)
    begin = tl.load(items + pid * 4 + 2)
    end = tl.load(items + pid * 4 + 3)
    sequence, head = row // H, row % H
    NQ: tl.constexpr = G * Q
    q_ptr += sequence * q_stride_b + head * G * q_stride_h
    if zone == _PACKED:
        acc, top, total = _packed_zone(
            q_ptr, q_stride_h, q_stride_q, key_codes, key_columns, key_affine, value_codes, value_affine,
            counts, starts, row, begin, end, logit_scale, NQ, Q, N, D, DP, W, CA, CB, MANY, PDL,
        )  # fmt: skip
    elif zone == _PINNED:
        at = tl.load(starts + row * 5 + 4) * D
        acc, top, total = _raw_zone(
            q_ptr, q_stride_h, q_stride_q, pinned_keys + at, pinned_values + at, D, begin, end, logit_scale,
            NQ, Q, N, D, DP, BT, PDL,
        )  # fmt: skip
    else:
        at = sequence * tail_stride_b + head * tail_stride_h
        end = tl.minimum(end, tl.load(tail_lengths + sequence))
        acc, top, total = _raw_zone(
            q_ptr, q_stride_h, q_stride_q, tail_keys + at, tail_values + at, tail_stride_t, begin, end, logit_scale,
            NQ, Q, N, D, DP, BT, PDL,
        )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    ni, di = tl.arange(0, N), tl.arange(0, DP)
    out = acc / tl.where(total > 0, total, 1.0)[None, :]
    at = (pid.to(tl.int64) * NQ + ni)[None, :] * D + di[:, None]
    tl.store(outputs + at, out, mask=(ni < NQ)[None, :] & (di < D)[:, None])
    lse = tl.where(total > 0, top + tl.log2(total), float("-inf"))
    tl.store(lses + pid * NQ + ni, lse, mask=ni < NQ)


@triton.jit
def merge_kernel(
    outputs, lses, first_item, out, out_lse, out_stride_b, out_stride_h, out_stride_q,
    lse_stride_b, lse_stride_h, lse_stride_q,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BI: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Merge the items of one row by their log-sum-exp, for one query."""
    row, n = tl.program_id(0), tl.program_id(1)
    NQ: tl.constexpr = G * Q
    begin, end = tl.load(first_item + row), tl.load(first_item + row + 1)
    ii, di = tl.arange(0, BI), tl.arange(0, DP)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros([DP], tl.float32)
    total = 0.0
    top = float("-inf")
    for start in range(begin, end, BI):
        ok = start + ii < end
        lse = tl.load(lses + (start + ii) * NQ + n, mask=ok, other=float("-inf"))
        part = tl.load(
            outputs + ((start + ii).to(tl.int64) * NQ + n)[:, None] * D + di[None, :],
            mask=ok[:, None] & (di < D)[None, :], other=0.0,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(lse, 0))
        base = tl.where(new > float("-inf"), new, 0.0)
        shrink = tl.exp2(top - base)
        weight = tl.exp2(lse - base)
        acc = acc * shrink + tl.sum(part * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        top = new
    acc = acc / tl.where(total > 0, total, 1.0)
    sequence, head = row // H, row % H
    q_head, query = head * G + n // Q, n % Q
    at = sequence.to(tl.int64) * out_stride_b + q_head * out_stride_h + query * out_stride_q
    tl.store(out + at + di, acc.to(out.dtype.element_ty), mask=di < D)
    lse = tl.where(total > 0, tl.where(top > float("-inf"), top, 0.0) + tl.log2(total), float("-inf"))
    tl.store(out_lse + sequence * lse_stride_b + q_head * lse_stride_h + query * lse_stride_q, lse)
