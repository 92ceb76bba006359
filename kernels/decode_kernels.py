"""Decode attention straight from packed codes: one launch over every zone of the cache, one that merges.

    o = sum_t p_t v_t / sum_t p_t,    p_t = 2^(x_t - max x),    x_t = scale * log2(e) * q k_t

A key is ``zero_c + scale_c * code``, its code a sum of 2-bit planes ``4^k``; a value ``zero_t + scale_t * code``.
So the query takes the scales of the keys (one column of the codes is one channel and plane), the probabilities
take those of the values, and tensor cores multiply the codes themselves:

* 16 bits hold one code of each of eight tokens. Two bits under a mask, read as float16, are a subnormal
  number, ``code * 4^j * 2^-24`` exactly: no shift and no conversion for the four tokens of each byte. The
  power of two is paid back in the logits and the probabilities.
* values are summed plane by plane, highest first, times four in between.

`naive_decode.attend` is the same in plain PyTorch.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode_plan import PACKED_ZONE, PINNED_ZONE
from .packed import CODED4, CODED8, CODED16, COLUMNS, KEY_EXPONENT, TOKENS, VALUE_EXPONENT

_N, _N4, _N8, _N16 = (tl.constexpr(i) for i in (TOKENS, CODED4, CODED8, CODED16))
_C, _KE, _VE = (tl.constexpr(i) for i in (COLUMNS, KEY_EXPONENT, VALUE_EXPONENT))
_PACKED, _PINNED = tl.constexpr(PACKED_ZONE), tl.constexpr(PINNED_ZONE)
# The interpreter has no inline assembly; there the masks are plain operations on 16-bit integers.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def _dot(a, b, c):
    if _INTERPRETED:  # which multiplies bfloat16 by its bit patterns
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    else:
        return tl.dot(a, b, c)


@triton.jit
def _codes(words, MASK: tl.constexpr, PAIRS: tl.constexpr):
    """Bits ``MASK`` of every word as a float16 (subnormal), two words an instruction (``PAIRS``: mask of both)."""
    if _INTERPRETED:
        return (words & MASK).to(tl.int16).to(tl.float16, bitcast=True)
    asm: tl.constexpr = "and.b32 $0, $1, " + PAIRS + ";"
    return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _upper(words):
    """The upper byte of every word in its lower byte; what the upper byte holds then is arbitrary."""
    if _INTERPRETED:
        return ((words.to(tl.int32) & 0xFFFF) >> 8).to(tl.int16)
    return tl.inline_asm_elementwise("shr.u32 $0, $1, 8;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)


@triton.jit
def _multiply(w, q, c0, c1, c2, c3):
    """``c_j + codes_j(w) @ q`` for the four tokens of the lower byte; returns the four sums."""
    c0 = _dot(_codes(w, 3, "0x00030003"), q, c0)
    c1 = _dot(_codes(w, 12, "0x000c000c"), q, c1)
    c2 = _dot(_codes(w, 48, "0x00300030"), q, c2)
    c3 = _dot(_codes(w, 192, "0x00c000c0"), q, c3)
    return c0, c1, c2, c3


@triton.jit
def _accumulate(w, a0, a1, a2, a3, acc):
    """``acc + sum_j codes_j(w) @ a_j`` for the four tokens of the lower byte."""
    acc = _dot(_codes(w, 3, "0x00030003"), a0, acc)
    acc = _dot(_codes(w, 12, "0x000c000c"), a1, acc)
    acc = _dot(_codes(w, 48, "0x00300030"), a2, acc)
    return _dot(_codes(w, 192, "0x00c000c0"), a3, acc)


@triton.jit
def _hide(s, slot, n, J: tl.constexpr):
    return tl.where((slot + J < n)[:, None], s, float("-inf"))


@triton.jit
def _affine(affine, slot, coded, J: tl.constexpr):
    """Scale and zero point of values as they are stored: float16 pairs, scale low, zero high."""
    return tl.load(affine + slot + J, mask=slot + J < coded, other=0)


@triton.jit
def _weigh(p, affine, factor, zeros):
    """Probabilities times the values' scales, float16, and ``zeros`` plus probabilities times zero points."""
    scale = (affine & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (affine >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (p * (scale * factor)[:, None]).to(tl.float16), zeros + p * zero[:, None]


@triton.jit
def _split(p, dtype: tl.constexpr):
    """``p`` as a sum of two numbers of ``dtype``: bfloat16 alone would lose more than the codes do."""
    high = p.to(dtype)
    return high, (p - high.to(tl.float32)).to(dtype)


@triton.jit
def _query(q_ptr, ni, di, strides_h, strides_q, NQ: tl.constexpr, Q: tl.constexpr, D: tl.constexpr):
    """Query rows ``g * Q + i`` of a KV head as columns, ``[DP, N]``."""
    at = (ni // Q) * strides_h + (ni % Q) * strides_q
    return tl.load(q_ptr + at[None, :] + di[:, None], mask=(ni < NQ)[None, :] & (di < D)[:, None], other=0.0)


@triton.jit
def _key_words(key_codes, word, column, n, C):
    """Words ``[W, columns]`` of some key columns."""
    mask = (word * 8 < n)[:, None] & (column < C)[None, :]
    return tl.load(key_codes + word.to(tl.int64)[:, None] * C + column[None, :], mask=mask, other=0)


@triton.jit
def _value_words(plane, pair, d2, blocks, D: tl.constexpr):
    """Words of one plane of values, ``[W / 2, 2 * DP]``: a row holds two words of each channel."""
    mask = (pair < blocks)[:, None] & (d2 < 2 * D)[None, :]
    return tl.load(plane + pair.to(tl.int64)[:, None] * (2 * D) + d2[None, :], mask=mask, other=0)


@triton.jit
def _across(v, W: tl.constexpr, DP: tl.constexpr):
    """The words of `_value_words` with channels as rows, ``[DP, W]``."""
    return tl.reshape(tl.permute(tl.reshape(v, [W // 2, DP, 2]), (1, 0, 2)), [DP, W])


@triton.jit
def _fold(q_ptr, q_at, key_columns, key_affine, norm, ni, at, C, NQ: tl.constexpr):
    """Queries times the scale of each key column and the weight of its plane, ``[columns, N]`` float16."""
    column = tl.load(key_columns + at, mask=at < C, other=-1).to(tl.int32)
    channel = column & 255
    scale = tl.load(key_affine + channel, mask=column >= 0, other=0)
    scale = (scale & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    scale *= tl.exp2(2.0 * (column >> 8).to(tl.float32))
    q = tl.load(
        q_ptr + q_at[None, :] + channel[:, None], mask=(ni < NQ)[None, :] & (column >= 0)[:, None], other=0.0
    )
    return (q.to(tl.float32) * norm[None, :] * scale[:, None]).to(tl.float16)


@triton.jit
def _packed_zone(
    q_ptr, q_stride_h, q_stride_q, key_codes, key_columns, key_affine, value_codes, value_affine, counts, starts, row, begin, end, logit_scale,
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
    q = _query(q_ptr, ni, di, q_stride_h, q_stride_q, NQ, Q, D).to(tl.float32)  # [DP, N]
    top_q = tl.max(tl.abs(q), 0)  # [N]
    affine = tl.load(key_affine + di, mask=di < D, other=0)
    zero = (affine >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
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
    f = _fold(q_ptr, q_at, key_columns, key_affine, norm, ni, ca, C, NQ)
    g = _fold(q_ptr, q_at, key_columns, key_affine, norm, ni, cb, C, NQ)
    for tile in tl.range(begin, end):
        word = tile * W + wi
        slot = word * 8
        pair = tile * (W // 2) + tl.arange(0, W // 2)
        w = _key_words(key_codes, word, ca, n, C)
        if CB <= 32:  # more would not fit into the registers beside the first
            more = _key_words(key_codes, word, cb, n, C)
        s0 = tl.zeros([W, N], tl.float32)
        s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
        s0, s1, s2, s3 = _multiply(w, f, s0, s1, s2, s3)
        s4, s5, s6, s7 = _multiply(_upper(w), f, s4, s5, s6, s7)
        if CB > 32:
            more = _key_words(key_codes, word, cb, n, C)
        s0, s1, s2, s3 = _multiply(more, g, s0, s1, s2, s3)
        s4, s5, s6, s7 = _multiply(_upper(more), g, s4, s5, s6, s7)
        if MANY:
            ce = CA + CB + tl.arange(0, 64)
            for c in range(0, C - CA - CB, 64):  # more columns than folded queries are kept for
                w = _key_words(key_codes, word, c + ce, n, C)
                h = _fold(q_ptr, q_at, key_columns, key_affine, norm, ni, c + ce, C, NQ)
                s0, s1, s2, s3 = _multiply(w, h, s0, s1, s2, s3)
                s4, s5, s6, s7 = _multiply(_upper(w), h, s4, s5, s6, s7)

        # What follows the logits is loaded before their maximum is known.
        lowest = _value_words(value_codes, pair, d2, blocks, D)
        e0, e1 = _affine(value_affine, slot, n, 0), _affine(value_affine, slot, n, 1)
        e2, e3 = _affine(value_affine, slot, n, 2), _affine(value_affine, slot, n, 3)
        e4, e5 = _affine(value_affine, slot, n, 4), _affine(value_affine, slot, n, 5)
        e6, e7 = _affine(value_affine, slot, n, 6), _affine(value_affine, slot, n, 7)
        if (tile + 1) * W * 8 > n:
            s0, s1, s2, s3 = _hide(s0, slot, n, 0), _hide(s1, slot, n, 1), _hide(s2, slot, n, 2), _hide(s3, slot, n, 3)
            s4, s5, s6, s7 = _hide(s4, slot, n, 4), _hide(s5, slot, n, 5), _hide(s6, slot, n, 6), _hide(s7, slot, n, 7)
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
        a0, zeros = _weigh(p0, e0, factor, zeros)
        a1, zeros = _weigh(p1, e1, factor * 0.25, zeros)
        a2, zeros = _weigh(p2, e2, factor * 0.0625, zeros)
        a3, zeros = _weigh(p3, e3, factor * 0.015625, zeros)
        a4, zeros = _weigh(p4, e4, factor, zeros)
        a5, zeros = _weigh(p5, e5, factor * 0.25, zeros)
        a6, zeros = _weigh(p6, e6, factor * 0.0625, zeros)
        a7, zeros = _weigh(p7, e7, factor * 0.015625, zeros)

        v = _across(lowest, W, DP)
        part = _accumulate(v, a0, a1, a2, a3, tl.zeros([DP, N], tl.float32))
        part = _accumulate(_upper(v), a4, a5, a6, a7, part)
        first = tile * W * 8
        plane = value_codes + blocks.to(tl.int64) * (2 * D)
        held, weight = blocks4, 4.0
        for i in range(1, tl.where(first < n16, 8, tl.where(first < n8, 4, tl.where(first < n4, 2, 1)))):
            # Weights that the loop changes (here: times one) are not kept in registers as operands all along.
            a0, a1, a2, a3, a4, a5, a6, a7 = a0 * one, a1 * one, a2 * one, a3 * one, a4 * one, a5 * one, a6 * one, a7 * one
            v = _across(_value_words(plane, pair, d2, held, D), W, DP)
            higher = _accumulate(v, a0, a1, a2, a3, tl.zeros([DP, N], tl.float32))
            part += _accumulate(_upper(v), a4, a5, a6, a7, higher) * weight
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
    q = _query(q_ptr, ni, di, q_stride_h, q_stride_q, NQ, Q, D).to(keys.dtype.element_ty)  # [DP, N]
    acc = tl.zeros([DP, N], tl.float32)
    total = tl.zeros([N], tl.float32)
    top = tl.full([N], float("-inf"), tl.float32)
    for start in range(begin, end, BT):
        ok = start + ti < end
        at = (start + ti).to(tl.int64)[:, None] * stride + di[None, :]
        mask = ok[:, None] & (di < D)[None, :]
        k = tl.load(keys + at, mask=mask, other=0.0)  # [BT, DP]
        s = tl.where(ok[:, None], _dot(k, q, tl.zeros([BT, N], tl.float32)) * logit_scale, float("-inf"))  # [BT, N]
        new = tl.maximum(top, tl.max(s, 0))
        shrink = tl.exp2(top - new)
        top = new
        p = tl.exp2(s - top[None, :])
        total = total * shrink + tl.sum(p, 0)
        v = tl.load(values + at, mask=mask, other=0.0)
        high, low = _split(p, v.dtype)
        v = tl.trans(v)
        acc = _dot(v, low, _dot(v, high, acc * shrink[None, :]))
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
