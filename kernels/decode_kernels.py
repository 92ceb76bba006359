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

from .decode_plan import PACKED_ZONE, PINNED_ZONE
from .packed import CODED, CODED4, CODED8, COLUMNS, KEY_EXPONENT, PINNED, TOKENS, VALUE_EXPONENT

_N, _N2, _N4, _N8 = (tl.constexpr(i) for i in (TOKENS, CODED, CODED4, CODED8))
_P, _C, _KE, _VE = (tl.constexpr(i) for i in (PINNED, COLUMNS, KEY_EXPONENT, VALUE_EXPONENT))
# The interpreter has no inline assembly; there the masks are plain operations on 16-bit integers.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

_PACKED, _PINNED = tl.constexpr(PACKED_ZONE), tl.constexpr(PINNED_ZONE)


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
def _multiply(w, b0, b1, b2, b3, c0, c1, c2, c3):
    """``c_j + codes_j(w) @ b_j`` for the four tokens of the lower byte; returns the four sums."""
    c0 = _dot(_codes(w, 3, "0x00030003"), b0, c0)
    c1 = _dot(_codes(w, 12, "0x000c000c"), b1, c1)
    c2 = _dot(_codes(w, 48, "0x00300030"), b2, c2)
    c3 = _dot(_codes(w, 192, "0x00c000c0"), b3, c3)
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
def _weigh(p, affine, slot, coded, factor, zeros, J: tl.constexpr):
    """Probabilities times the values' scales, float16, and ``zeros`` plus probabilities times zero points."""
    both = tl.load(affine + slot + J, mask=slot + J < coded, other=0)  # float16 pair: scale low, zero high
    scale = (both & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (p * (scale * factor)[:, None]).to(tl.float16), zeros + p * zero[:, None]


@triton.jit
def _split(p, dtype: tl.constexpr):
    """``p`` as a sum of two numbers of ``dtype``: bfloat16 alone would lose more than the codes do."""
    high = p.to(dtype)
    return high, (p - high.to(tl.float32)).to(dtype)


@triton.jit
def _whole(acc, p, values, slot, coded, tokens, di, D: tl.constexpr, J: tl.constexpr):
    """``acc + v^T p`` over the slots whose values are stored as they are."""
    at = slot + J
    ok = (at >= coded) & (at < tokens)
    v = tl.load(values + (at - coded).to(tl.int64)[:, None] * D + di[None, :], mask=ok[:, None] & (di < D)[None, :], other=0.0)
    high, low = _split(tl.where(ok[:, None], p, 0.0), v.dtype)
    v = tl.trans(v)
    return _dot(v, low, _dot(v, high, acc))


@triton.jit
def _query(q_ptr, ni, di, strides_h, strides_q, NQ: tl.constexpr, Q: tl.constexpr, D: tl.constexpr):
    """Query rows ``g * Q + i`` of a KV head as columns, ``[DP, N]``."""
    at = (ni // Q) * strides_h + (ni % Q) * strides_q
    return tl.load(q_ptr + at[None, :] + di[:, None], mask=(ni < NQ)[None, :] & (di < D)[:, None], other=0.0)


@triton.jit
def _packed_zone(
    q_ptr, q_stride_h, q_stride_q, key_codes, key_columns, key_affine, value_codes, value_affine, whole_values,
    counts, starts, row, begin, end, logit_scale,
    NQ: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, KC: tl.constexpr,
):  # fmt: skip
    """Tiles ``begin`` to ``end`` of ``8 * W`` slots each: output sums ``[DP, N]``, maxima and sums ``[N]``."""
    n = tl.load(counts + row * 8 + _N)
    n2 = tl.load(counts + row * 8 + _N2)
    n4 = tl.load(counts + row * 8 + _N4)
    n8 = tl.load(counts + row * 8 + _N8)
    C = tl.multiple_of(tl.load(counts + row * 8 + _C), 16)
    key_exponent = tl.load(counts + row * 8 + _KE).to(tl.float32)
    value_exponent = tl.load(counts + row * 8 + _VE).to(tl.float32)
    key_codes += tl.multiple_of(tl.load(starts + row * 6), 16)
    value_codes += tl.multiple_of(tl.load(starts + row * 6 + 1), 16 if D % 8 == 0 else 2)
    key_columns += tl.multiple_of(tl.load(starts + row * 6 + 2), 16)
    value_affine += tl.load(starts + row * 6 + 3)
    whole_values += tl.load(starts + row * 6 + 4) * D
    key_affine += row * D  # float16 pairs

    wi, ni, ci, di, d2 = tl.arange(0, W), tl.arange(0, N), tl.arange(0, KC), tl.arange(0, DP), tl.arange(0, 2 * DP)
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
    zeros = tl.zeros([N], tl.float32)
    total = tl.zeros([N], tl.float32)
    top = tl.full([N], float("-inf"), tl.float32)
    key_scale = tl.exp2(-key_exponent)
    factor = tl.exp2(14.0 - value_exponent)
    value_unit = tl.exp2(value_exponent + 10.0)
    for tile in range(begin, end):
        word = tile * W + wi
        slot = word * 8
        key_at = key_codes + word.to(tl.int64)[:, None] * C + ci[None, :]
        held = slot < n
        s0 = tl.zeros([W, N], tl.float32)
        s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
        for c in range(0, C, KC):
            inside = c + ci < C
            w = tl.load(key_at + c, mask=held[:, None] & inside[None, :], other=0)  # [W, KC]
            column = tl.load(key_columns + c + ci, mask=inside, other=-1).to(tl.int32)
            channel = column & 255
            scale = tl.load(key_affine + channel, mask=column >= 0, other=0)
            scale = (scale & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            scale *= tl.exp2(2.0 * (column >> 8).to(tl.float32)) * key_scale
            part = tl.load(q_ptr + q_at[None, :] + channel[:, None], mask=(ni < NQ)[None, :], other=0.0)  # [KC, N]
            folded = (part.to(tl.float32) * fold[None, :] * scale[:, None]).to(tl.float16)
            s0, s1, s2, s3 = _multiply(w, folded, folded, folded, folded, s0, s1, s2, s3)
            s4, s5, s6, s7 = _multiply(_upper(w), folded, folded, folded, folded, s4, s5, s6, s7)

        if (tile + 1) * W * 8 > n:
            s0, s1, s2, s3 = _hide(s0, slot, n, 0), _hide(s1, slot, n, 1), _hide(s2, slot, n, 2), _hide(s3, slot, n, 3)
            s4, s5, s6, s7 = _hide(s4, slot, n, 4), _hide(s5, slot, n, 5), _hide(s6, slot, n, 6), _hide(s7, slot, n, 7)
        x0, x1 = tl.max(tl.maximum(s0, s4), 0) * u0, tl.max(tl.maximum(s1, s5), 0) * u1
        x2, x3 = tl.max(tl.maximum(s2, s6), 0) * u2, tl.max(tl.maximum(s3, s7), 0) * u3
        new = tl.maximum(top, tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)))  # without the bias
        shrink = tl.exp2(top - new)
        top = new
        p0, p4 = tl.exp2(s0 * u0[None, :] - top[None, :]), tl.exp2(s4 * u0[None, :] - top[None, :])
        p1, p5 = tl.exp2(s1 * u1[None, :] - top[None, :]), tl.exp2(s5 * u1[None, :] - top[None, :])
        p2, p6 = tl.exp2(s2 * u2[None, :] - top[None, :]), tl.exp2(s6 * u2[None, :] - top[None, :])
        p3, p7 = tl.exp2(s3 * u3[None, :] - top[None, :]), tl.exp2(s7 * u3[None, :] - top[None, :])
        total = total * shrink + tl.sum(((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7)), 0)
        acc *= shrink[None, :]
        if (tile + 1) * W * 8 > n2:
            acc = _whole(acc, p0, whole_values, slot, n2, n, di, D, 0)
            acc = _whole(acc, p1, whole_values, slot, n2, n, di, D, 1)
            acc = _whole(acc, p2, whole_values, slot, n2, n, di, D, 2)
            acc = _whole(acc, p3, whole_values, slot, n2, n, di, D, 3)
            acc = _whole(acc, p4, whole_values, slot, n2, n, di, D, 4)
            acc = _whole(acc, p5, whole_values, slot, n2, n, di, D, 5)
            acc = _whole(acc, p6, whole_values, slot, n2, n, di, D, 6)
            acc = _whole(acc, p7, whole_values, slot, n2, n, di, D, 7)
        zs = tl.zeros([W, N], tl.float32)
        a0, zs = _weigh(p0, value_affine, slot, n2, factor, zs, 0)
        a1, zs = _weigh(p1, value_affine, slot, n2, factor * 0.25, zs, 1)
        a2, zs = _weigh(p2, value_affine, slot, n2, factor * 0.0625, zs, 2)
        a3, zs = _weigh(p3, value_affine, slot, n2, factor * 0.015625, zs, 3)
        a4, zs = _weigh(p4, value_affine, slot, n2, factor, zs, 4)
        a5, zs = _weigh(p5, value_affine, slot, n2, factor * 0.25, zs, 5)
        a6, zs = _weigh(p6, value_affine, slot, n2, factor * 0.0625, zs, 6)
        a7, zs = _weigh(p7, value_affine, slot, n2, factor * 0.015625, zs, 7)
        zeros = zeros * shrink + tl.sum(zs, 0)

        pair = tile * (W // 2) + tl.arange(0, W // 2)
        value_at = value_codes + pair.to(tl.int64)[:, None] * (2 * D) + d2[None, :]
        first = tile * W * 8
        planes = tl.where(first < n8, 4, tl.where(first < n4, 2, tl.where(first < n2, 1, 0)))
        blocks2, blocks4, blocks8 = (n2 + 15) // 16, (n4 + 15) // 16, (n8 + 15) // 16
        part = tl.zeros([DP, N], tl.float32)
        for i in range(planes):
            plane = planes - 1 - i
            skip = tl.where(plane > 0, blocks2, 0) + tl.where(plane > 1, blocks4, 0) + tl.where(plane > 2, blocks8, 0)
            blocks = tl.where(plane > 1, blocks8, tl.where(plane > 0, blocks4, blocks2))
            v = tl.load(
                value_at + skip.to(tl.int64) * (2 * D), mask=(pair < blocks)[:, None] & (d2 < 2 * D)[None, :], other=0
            )
            v = tl.reshape(tl.permute(tl.reshape(v, [W // 2, DP, 2]), (1, 0, 2)), [DP, W])
            part = _accumulate(v, a0, a1, a2, a3, part * 4.0)
            part = _accumulate(_upper(v), a4, a5, a6, a7, part)
        acc += part * value_unit
    return acc + zeros[None, :], top + bias, total


@triton.jit
def _raw_zone(
    q_ptr, q_stride_h, q_stride_q, keys, values, stride, begin, end, logit_scale,
    NQ: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """16-bit tokens ``begin`` to ``end``: output sums ``[DP, N]``, maxima and sums ``[N]``."""
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
    key_codes, key_columns, key_affine, value_codes, value_affine, whole_values, pinned_keys, pinned_values,
    counts, starts, tail_keys, tail_values, tail_stride_b, tail_stride_h, tail_stride_t, tail_lengths,
    items, outputs, lses, logit_scale,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, KC: tl.constexpr, BT: tl.constexpr,
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
            q_ptr, q_stride_h, q_stride_q, key_codes, key_columns, key_affine, value_codes, value_affine, whole_values,
            counts, starts, row, begin, end, logit_scale, NQ, Q, N, D, DP, W, KC,
        )  # fmt: skip
    elif zone == _PINNED:
        at = tl.load(starts + row * 6 + 5) * D
        acc, top, total = _raw_zone(
            q_ptr, q_stride_h, q_stride_q, pinned_keys + at, pinned_values + at, D, begin, end, logit_scale,
            NQ, Q, N, D, DP, BT,
        )  # fmt: skip
    else:
        at = sequence * tail_stride_b + head * tail_stride_h
        end = tl.minimum(end, tl.load(tail_lengths + sequence))
        acc, top, total = _raw_zone(
            q_ptr, q_stride_h, q_stride_q, tail_keys + at, tail_values + at, tail_stride_t, begin, end, logit_scale,
            NQ, Q, N, D, DP, BT,
        )  # fmt: skip
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
):  # fmt: skip
    """Merge the items of one row by their log-sum-exp, for one query."""
    row, n = tl.program_id(0), tl.program_id(1)
    NQ: tl.constexpr = G * Q
    begin, end = tl.load(first_item + row), tl.load(first_item + row + 1)
    ii, di = tl.arange(0, BI), tl.arange(0, DP)
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
