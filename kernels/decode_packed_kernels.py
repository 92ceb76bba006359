"""The packed zone of decode attention: digits as they are stored, multiplied by tensor cores.

    x_t = scale * log2(e) * q k_t,    o = sum_t 2^(x_t - max x) v_t

A key is ``zero_c + scale_c * code``, a value ``zero_t + scale_t * code``, a code the sum of its digits, of 4 bits or 2.
So the query takes the scales of the keys (one column is one digit of one channel), the probabilities take those of the
values, and tensor cores multiply the digits themselves (`decode_codes_kernels`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .decode_codes_kernels import (
    accumulate,
    across,
    column_scales,
    down,
    fold_query,
    hide,
    key_nibbles,
    key_pairs,
    load_affine,
    load_query,
    power_of_2,
    prefetch,
    value_words,
    weigh,
    zero_of,
)
from .packed import CODED4, CODED8, CODED16, COLUMNS, KEY_EXPONENT, NIBBLES, PINNED_START, TOKENS, VALUE_EXPONENT

_N, _N4, _N8, _N16 = (tl.constexpr(i) for i in (TOKENS, CODED4, CODED8, CODED16))
_C, _A, _KE, _VE = (tl.constexpr(i) for i in (COLUMNS, NIBBLES, KEY_EXPONENT, VALUE_EXPONENT))
_LEAST_QUERY = tl.constexpr(2.0**-60)
_COUNTS, _STARTS = tl.constexpr(VALUE_EXPONENT + 1), tl.constexpr(PINNED_START + 1)


@triton.jit
def _prefetch_tile(
    key_codes, value_codes, value_pairs, tile, C, blocks, blocks4,
    D: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Ask for a tile's keys, and with ``AHEAD`` for the lowest digits of its values."""
    tile = tile.to(tl.int64)
    prefetch(key_codes, tile * W * C, W * C, 2 * blocks * C, power_of_2(W * COLUMNS // 64))
    if AHEAD:
        lines: tl.constexpr = power_of_2(W * D // 64)
        prefetch(value_codes, tile * W * 2 * D, W * 2 * D, blocks4 * 4 * D, 2 * lines)
        if tile * (W // 2) >= blocks4:
            prefetch(value_pairs, tile * W * D, W * D, blocks * 2 * D, lines)


@triton.jit
def has_more_columns(counts, row, nibbles: tl.constexpr, pairs: tl.constexpr):
    """Whether a row has more key columns than a program keeps folded queries for."""
    columns, held = tl.load(counts + row * _COUNTS + _C), tl.load(counts + row * _COUNTS + _A)
    return (held > nibbles) | (columns - 2 * held > pairs)


@triton.jit
def packed_zone(
    q_ptr, q_stride_h, q_stride_q, key_codes, key_columns, key_affine, value_codes, value_affine,
    counts, starts, row, begin, end, ni, logit_scale,
    NQ: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, NA: tl.constexpr, NB: tl.constexpr, NS: tl.constexpr, MANY: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Tiles ``begin`` to ``end`` of ``W`` octets of slots, for the query rows ``ni`` ``[N]`` of the KV head.

    Returns output sums ``[DP, N]``, maxima and sums ``[N]``.
    """
    counts += row * _COUNTS
    starts += row * _STARTS
    n, n4, n8, n16 = tl.load(counts + _N), tl.load(counts + _N4), tl.load(counts + _N8), tl.load(counts + _N16)
    C, A = tl.multiple_of(tl.load(counts + _C), 16), tl.multiple_of(tl.load(counts + _A), 16)
    S = C - 2 * A
    key_exponent = tl.load(counts + _KE).to(tl.float32)
    value_exponent = tl.load(counts + _VE).to(tl.float32)
    blocks, blocks4, blocks8, blocks16 = (n + 15) // 16, (n4 + 15) // 16, (n8 + 15) // 16, (n16 + 15) // 16
    key_codes += tl.multiple_of(tl.load(starts), 16)
    value_codes += tl.multiple_of(tl.load(starts + 1), 16 if D % 8 == 0 else 2)
    key_columns += tl.multiple_of(tl.load(starts + 2), 16)
    value_affine += tl.load(starts + 3)
    key_affine += row * D  # float16 pairs
    # Where block 0 of the 2-bit plane would be: it starts with block `blocks4`.
    value_pairs = value_codes + (blocks4 + 2 * blocks8 + 4 * blocks16).to(tl.int64) * (2 * D)
    wi, di, d2 = tl.arange(0, W), tl.arange(0, DP), tl.arange(0, 2 * DP)
    zero = zero_of(tl.load(key_affine + di, mask=di < D, other=0))
    if NA > 0:
        ca = tl.arange(0, NA)
        channel_a, scale_a = column_scales(key_columns, key_affine, ca, A)
    if NB > 0:
        cb = NA + tl.arange(0, NB)
        channel_b, scale_b = column_scales(key_columns, key_affine, cb, A)
    if NS > 0:
        cs = tl.arange(0, NS)
        channel_s, scale_s = column_scales(key_columns + A, key_affine, cs, S)
    # While the launch before this one ends: what the first tile reads is then no further than the L2 cache.
    _prefetch_tile(key_codes, value_codes, value_pairs, begin, C, blocks, blocks4, D, W, 2 * (NA + NB) + NS, AHEAD)
    if PDL:
        gdc_wait()  # the query is made by the launch before this one
    q = load_query(q_ptr, ni, di, q_stride_h, q_stride_q, NQ, Q, D).to(tl.float32)  # [DP, N]
    # A query of zeros has an even share of all tokens; 0 times the logits of hidden ones would be no number.
    top_q = tl.maximum(tl.max(tl.abs(q), 0), _LEAST_QUERY)  # [N]
    bias = tl.sum(q * zero[:, None], 0) * logit_scale  # [N]
    # Folded queries stay below 2^14, weighted probabilities too: float16 keeps its precision down to 2^-28 of that.
    fold = 16384.0 / top_q
    even = top_q * tl.exp2(key_exponent + 10.0) * logit_scale  # 2^24 of the subnormal digits over 2^14
    odd = even * 0.0625
    q_at = (ni // Q) * q_stride_h + (ni % Q) * q_stride_q

    acc = tl.zeros([DP, N], tl.float32)
    zeros = tl.zeros([W, N], tl.float32)  # summed over octets only at the end
    total = tl.zeros([W, N], tl.float32)
    top = tl.full([N], float("-inf"), tl.float32)
    factor = tl.exp2(14.0 - value_exponent)
    value_unit = tl.exp2(value_exponent + 10.0)
    one = (n > 0).to(tl.float16)
    norm = fold * tl.exp2(-key_exponent)
    if NA > 0:
        fa = fold_query(q_ptr, q_at, channel_a, scale_a, norm, ni, NQ)
    if NB > 0:
        fb = fold_query(q_ptr, q_at, channel_b, scale_b, norm, ni, NQ)
    if NS > 0:
        fs = fold_query(q_ptr, q_at, channel_s, scale_s, norm, ni, NQ)
    for tile in tl.range(begin, end):
        octet = tile * W + wi
        slot = octet * 8
        block = tile * (W // 2) + tl.arange(0, W // 2)
        s0 = tl.zeros([W, N], tl.float32)
        s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
        if NS > 0:
            pairs = key_codes + 2 * A
            s0, s1, s2, s3, s4, s5, s6, s7 = key_pairs(pairs, octet, cs, n, S, C, fs, s0, s1, s2, s3, s4, s5, s6, s7)
            if MANY:
                for c in range(NS, S, 32):  # more columns than folded queries are kept for
                    ce = c + tl.arange(0, 32)
                    channel_e, scale_e = column_scales(key_columns + A, key_affine, ce, S)
                    fe = fold_query(q_ptr, q_at, channel_e, scale_e, norm, ni, NQ)
                    s0, s1, s2, s3, s4, s5, s6, s7 = key_pairs(
                        pairs, octet, ce, n, S, C, fe, s0, s1, s2, s3, s4, s5, s6, s7
                    )
        if NA > 0:
            s0, s1, s2, s3, s4, s5, s6, s7 = key_nibbles(
                key_codes, octet, ca, n, A, C, fa, s0, s1, s2, s3, s4, s5, s6, s7
            )
        if NB > 0:
            if A > NA:
                s0, s1, s2, s3, s4, s5, s6, s7 = key_nibbles(
                    key_codes, octet, cb, n, A, C, fb, s0, s1, s2, s3, s4, s5, s6, s7
                )
        if MANY:
            for c in range(NA + NB, A, 32):
                ce = c + tl.arange(0, 32)
                channel_e, scale_e = column_scales(key_columns, key_affine, ce, A)
                fe = fold_query(q_ptr, q_at, channel_e, scale_e, norm, ni, NQ)
                s0, s1, s2, s3, s4, s5, s6, s7 = key_nibbles(
                    key_codes, octet, ce, n, A, C, fe, s0, s1, s2, s3, s4, s5, s6, s7
                )

        # What follows the logits is loaded before their maximum is known.
        e0, e1 = load_affine(value_affine, slot, n, 0), load_affine(value_affine, slot, n, 1)
        e2, e3 = load_affine(value_affine, slot, n, 2), load_affine(value_affine, slot, n, 3)
        e4, e5 = load_affine(value_affine, slot, n, 4), load_affine(value_affine, slot, n, 5)
        e6, e7 = load_affine(value_affine, slot, n, 6), load_affine(value_affine, slot, n, 7)
        if (tile + 1) * W * 8 > n:
            s0, s1, s2, s3 = hide(s0, slot, n, 0), hide(s1, slot, n, 1), hide(s2, slot, n, 2), hide(s3, slot, n, 3)
            s4, s5, s6, s7 = hide(s4, slot, n, 4), hide(s5, slot, n, 5), hide(s6, slot, n, 6), hide(s7, slot, n, 7)
        x0 = tl.maximum(tl.maximum(s0, s2), tl.maximum(s4, s6))
        x1 = tl.maximum(tl.maximum(s1, s3), tl.maximum(s5, s7))
        new = tl.maximum(top, tl.max(tl.maximum(x0, x1 * 0.0625), 0) * even)  # without the bias
        shrink = tl.exp2(top - new)
        top = new
        p0, p1 = tl.exp2(s0 * even[None, :] - top[None, :]), tl.exp2(s1 * odd[None, :] - top[None, :])
        p2, p3 = tl.exp2(s2 * even[None, :] - top[None, :]), tl.exp2(s3 * odd[None, :] - top[None, :])
        p4, p5 = tl.exp2(s4 * even[None, :] - top[None, :]), tl.exp2(s5 * odd[None, :] - top[None, :])
        p6, p7 = tl.exp2(s6 * even[None, :] - top[None, :]), tl.exp2(s7 * odd[None, :] - top[None, :])
        total = total * shrink[None, :] + (((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7)))
        acc *= shrink[None, :]
        zeros *= shrink[None, :]
        a0, zeros = weigh(p0, e0, factor, zeros)
        a1, zeros = weigh(p1, e1, factor * 0.0625, zeros)
        a2, zeros = weigh(p2, e2, factor, zeros)
        a3, zeros = weigh(p3, e3, factor * 0.0625, zeros)
        a4, zeros = weigh(p4, e4, factor, zeros)
        a5, zeros = weigh(p5, e5, factor * 0.0625, zeros)
        a6, zeros = weigh(p6, e6, factor, zeros)
        a7, zeros = weigh(p7, e7, factor * 0.0625, zeros)

        part = tl.zeros([DP, N], tl.float32)
        first = tile * W * 8
        if (tile + 1) * (W // 2) > blocks4:
            v = across(value_words(value_pairs, block, d2, blocks4, blocks, 2 * D, D), W, DP)
            part = accumulate(v, a0, a1, a2, a3, part, 2)
            part = accumulate(down(v, 8), a4, a5, a6, a7, part, 2)
        plane = value_codes
        held, weight = blocks4, 1.0
        for i in range(tl.where(first < n16, 4, tl.where(first < n8, 2, tl.where(first < n4, 1, 0)))):
            # Weights that the loop changes (here: times one) are not kept in registers as operands all along.
            a0, a1, a2, a3 = a0 * one, a1 * one, a2 * one, a3 * one
            a4, a5, a6, a7 = a4 * one, a5 * one, a6 * one, a7 * one
            low = value_words(plane, block, d2, 0, held, 4 * D, D)
            high = value_words(plane + 2 * D, block, d2, 0, held, 4 * D, D)
            more = accumulate(across(low, W, DP), a0, a1, a2, a3, tl.zeros([DP, N], tl.float32), 4)
            part += accumulate(across(high, W, DP), a4, a5, a6, a7, more, 4) * weight
            weight *= 16.0
            plane += held.to(tl.int64) * (4 * D)
            held = tl.where(i == 0, blocks8, blocks16)
        acc += part * value_unit
    return acc + tl.sum(zeros, 0)[None, :], top + bias, tl.sum(total, 0)
