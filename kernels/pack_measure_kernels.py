"""Triton kernels that list and measure what is to be packed, before `pack_write_kernels` write it.

    zero = below(min x)    scale = above((max x - zero) / (2^b - 1))

(of rotated values of 2 bits the extremes are first moved inwards) in float32 with correctly rounded division, ``below``
and ``above`` to the next float16: each is that of the twin, `naive_pack.pack`, bit for bit. In order:

* `tally_kernel` and `slots_kernel` count each row's tokens and list them in order of slots, pinned ones last.
* `measure_kernel` gathers the coded ones: extremes and sums of the key channels, affine of the values.
* `tables_kernel` merges them for each row: affine and places of the key channels.

Tokens are of a kind: 0 to 3 for values of 16, 8, 4 and 2 bits, 4 pinned, 5 dropped.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .packed import (
    CODED4,
    CODED8,
    CODED16,
    COLUMNS,
    KEY_EXPONENT,
    NIBBLES,
    NOT_FINITE,
    PINNED,
    TOKENS,
    VALUE_EXPONENT,
)

KINDS = 8  # of which 5 are counted; a power of two
REPORT = VALUE_EXPONENT + 2  # columns: those of `Packed.counts`, then tokens pinned as nothing is quantised

_KINDS, _REPORT, _NOT_FINITE = tl.constexpr(KINDS), tl.constexpr(REPORT), tl.constexpr(NOT_FINITE)
_N, _N4, _N8, _N16 = (tl.constexpr(i) for i in (TOKENS, CODED4, CODED8, CODED16))
_P, _C, _A, _KE, _VE = (tl.constexpr(i) for i in (PINNED, COLUMNS, NIBBLES, KEY_EXPONENT, VALUE_EXPONENT))
_RAW = tl.constexpr(REPORT - 1)


@triton.jit
def _half_below(x):
    """The largest float16 that is at most ``x``."""
    half = x.to(tl.float16)
    raw = half.to(tl.int16, bitcast=True)
    below = tl.where(half > 0, raw - 1, tl.where(half < 0, raw + 1, -0x7FFF)).to(tl.int16)
    return tl.where(half.to(tl.float32) > x, below.to(tl.float16, bitcast=True), half)


@triton.jit
def _affine(low, high, largest):
    """Scale and zero point, float16, of codes up to ``largest`` (float32)."""
    zero = _half_below(low)
    return -_half_below(-tl.div_rn(high - zero.to(tl.float32), largest)), zero


@triton.jit
def _narrowed(low, high, width):
    """`naive_pack.narrowed`: no rounding but that of its additions, fused with the products or not."""
    extent = high - low
    return (
        tl.where(width == 2, low + extent * 0.125 + extent * 0.0625, low),
        tl.where(width == 2, high - extent * 0.125 - extent * 0.0625, high),
    )


@triton.jit
def largest_code(width):
    """The largest code of each width."""
    least = tl.where(width == 6, 63.0, tl.where(width == 4, 15.0, 3.0))
    return tl.where(width == 16, 65535.0, tl.where(width == 8, 255.0, least))


@triton.jit
def _weight(width):
    """Weight of the highest 2 bits of each width."""
    least = tl.where(width == 6, 16.0, tl.where(width == 4, 4.0, 1.0))
    return tl.where(width == 16, 16384.0, tl.where(width == 8, 64.0, least))


@triton.jit
def _peaks(scale, zero, width):
    """Scale times the weight of the highest 2 bits; infinite where scale or zero point are not finite."""
    scale = scale.to(tl.float32)
    finite = (tl.abs(scale) < float("inf")) & (tl.abs(zero.to(tl.float32)) < float("inf"))
    return tl.where(finite, scale * _weight(width), float("inf"))


@triton.jit
def _exponent(peak):
    """The least ``e`` with ``peak <= 2 ** e``; 0 for 0, ``NOT_FINITE`` for infinity."""
    raw = peak.to(tl.int32, bitcast=True)
    power = (raw >> 23) - 127 + ((raw & 0x7FFFFF) != 0).to(tl.int32)
    return tl.where(peak == 0, 0, tl.where(peak < float("inf"), power, _NOT_FINITE))


@triton.jit
def _kinds(value_bits, pinned, at, ok):
    """Kinds of the tokens ``at`` of ``[R, T]``."""
    bits = tl.load(value_bits + at, mask=ok, other=0).to(tl.int32)
    kind = tl.where(bits == 4, 2, tl.where(bits == 2, 3, 5))
    kind = tl.where(bits == 16, 0, tl.where(bits == 8, 1, kind))
    return tl.where(tl.load(pinned + at, mask=ok, other=0) != 0, 4, kind)


@triton.jit
def tile(base, tokens, stride_t, di, ok, D: tl.constexpr):
    """Rows ``tokens`` of ``[T, D]``, ``[len(tokens), len(di)]``; 0 where not ``ok``."""
    at = tokens.to(tl.int64)[:, None] * stride_t + di[None, :]
    return tl.load(base + at, mask=ok[:, None] & (di < D)[None, :], other=0)


@triton.jit
def tally_kernel(value_bits, pinned, tally, T, SPAN: tl.constexpr):
    """``tally`` ``[R, spans, KINDS]``: tokens of each kind in one span of one row."""
    span, row = tl.program_id(0), tl.program_id(1)
    ti, ki = span * SPAN + tl.arange(0, SPAN), tl.arange(0, _KINDS)
    kind = _kinds(value_bits, pinned, row.to(tl.int64) * T + ti, ti < T)
    count = tl.sum((kind[:, None] == ki[None, :]).to(tl.int32), 0)
    tl.store(tally + (row.to(tl.int64) * tl.num_programs(0) + span) * _KINDS + ki, count)


@triton.jit
def slots_kernel(
    value_bits, key_bits, pinned, tally, report, token, T,
    D: tl.constexpr, DP: tl.constexpr, SPAN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """``token`` ``[R, T]``, that of each slot, for one span of one row; its counts in ``report`` ``[R, REPORT]``."""
    span, row, spans = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    di, ki = tl.arange(0, DP), tl.arange(0, _KINDS)
    total, before = tl.zeros([_KINDS], tl.int32), tl.zeros([_KINDS], tl.int32)
    for start in range(0, spans, BS):
        si = start + tl.arange(0, BS)
        at = tally + (row.to(tl.int64) * spans + si)[:, None] * _KINDS + ki[None, :]
        count = tl.load(at, mask=(si < spans)[:, None], other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((si < span)[:, None], count, 0), 0)
    n16 = tl.sum(tl.where(ki < 1, total, 0), 0)
    n8 = tl.sum(tl.where(ki < 2, total, 0), 0)
    n4 = tl.sum(tl.where(ki < 3, total, 0), 0)
    n = tl.sum(tl.where(ki < 4, total, 0), 0)
    width = tl.load(key_bits + row * D + di, mask=di < D, other=0).to(tl.int32)
    quantises = (n > n16) | (tl.sum((width == 16).to(tl.int32), 0) < D)
    raw = tl.where(quantises, 0, n)  # tokens that are stored with the pinned ones; all the counts are this one then
    n, n4, n8, n16 = n - raw, n4 - raw, n8 - raw, n16 - raw
    if span == 0:
        report += row * _REPORT
        tl.store(report + _N, n)
        tl.store(report + _N4, n4)
        tl.store(report + _N8, n8)
        tl.store(report + _N16, n16)
        tl.store(report + _P, raw + tl.sum(tl.where(ki == 4, total, 0), 0))
        tl.store(report + _RAW, raw)
    first, ti = row.to(tl.int64) * T, span * SPAN + tl.arange(0, SPAN)
    kind = _kinds(value_bits, pinned, first + ti, ti < T)
    kind = tl.where((raw > 0) & (kind == 0), 4, kind)
    own_first = tl.where(ki == 0, 0, tl.where(ki == 1, n16, tl.where(ki == 2, n8, tl.where(ki == 3, n4, n))))
    # A raw row has no tokens of kinds 1 to 3, and those of kind 0 stand among the pinned ones, by position.
    shift = tl.where((ki == 4) & (raw > 0), tl.sum(tl.where(ki == 0, before, 0), 0), 0)
    slots = own_first + before + shift
    for k in tl.static_range(5):
        own = (kind == k).to(tl.int32)
        slot = tl.sum(tl.where(ki == k, slots, 0), 0) + tl.cumsum(own, 0) - 1
        tl.store(token + first + slot, ti, mask=own > 0)


@triton.jit
def measure_kernel(
    keys, key_stride_b, key_stride_h, key_stride_t, values, value_stride_b, value_stride_h, value_stride_t,
    report, token, peak, low, high, total, affine, T,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, CHUNK: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """One chunk of slots of one row.

    Writes ``low``, ``high``, ``total`` ``[R, chunks, D]`` of the keys, infinite where one is not a number;
    ``affine`` ``[R, T, 2]`` of the slots' values; ``peak`` ``[R, chunks]``, the largest scale of a value's highest
    2 bits, infinite if a value is not finite. Chunks beyond the row's last slot are left alone.
    """
    chunk, row = tl.program_id(0), tl.program_id(1)
    report += row * _REPORT
    n, n4 = tl.load(report + _N), tl.load(report + _N4)
    n8, n16 = tl.load(report + _N8), tl.load(report + _N16)
    if chunk * CHUNK >= n:
        return
    keys += (row // H).to(tl.int64) * key_stride_b + (row % H).to(tl.int64) * key_stride_h
    values += (row // H).to(tl.int64) * value_stride_b + (row % H).to(tl.int64) * value_stride_h
    first, di = row.to(tl.int64) * T, tl.arange(0, DP)
    lows, highs = tl.full([DP], float("inf"), tl.float32), tl.full([DP], float("-inf"), tl.float32)
    totals, top = tl.zeros([DP], tl.float64), tl.full([], 0.0, tl.float32)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), BT):
        slot = start + tl.arange(0, BT)
        coded, inside = slot < n, (di < D)[None, :]
        ti = tl.load(token + first + slot, mask=coded, other=0)
        k = tile(keys, ti, key_stride_t, di, coded, D).to(tl.float32)
        k = tl.where(k == k, k, float("inf"))
        lows = tl.minimum(lows, tl.min(tl.where(coded[:, None], k, float("inf")), 0))
        highs = tl.maximum(highs, tl.max(tl.where(coded[:, None], k, float("-inf")), 0))
        totals += tl.sum(k.to(tl.float64), 0)
        v = tile(values, ti, value_stride_t, di, coded, D).to(tl.float32)
        v = tl.where(v == v, v, float("inf"))
        width = tl.where(slot < n16, 16, tl.where(slot < n8, 8, tl.where(slot < n4, 4, 2)))
        v_low = tl.min(tl.where(inside, v, float("inf")), 1)
        v_high = tl.max(tl.where(inside, v, float("-inf")), 1)
        if NARROW:
            v_low, v_high = _narrowed(v_low, v_high, width)
        scale, zero = _affine(v_low, v_high, largest_code(width))
        tl.store(affine + (first + slot) * 2, scale, mask=coded)
        tl.store(affine + (first + slot) * 2 + 1, zero, mask=coded)
        top = tl.maximum(top, tl.max(tl.where(coded, _peaks(scale, zero, width), 0.0), 0))
    part = row.to(tl.int64) * tl.num_programs(0) + chunk
    tl.store(peak + part, top)
    tl.store(low + part * D + di, lows, mask=di < D)
    tl.store(high + part * D + di, highs, mask=di < D)
    tl.store(total + part * D + di, totals, mask=di < D)


@triton.jit
def tables_kernel(
    key_bits, report, peak, low, high, total, key_affine, place, chunks,
    D: tl.constexpr, DP: tl.constexpr, BC: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row: the rest of its ``report``, ``key_affine`` ``[R, D, 2]`` and ``place`` ``[R, 4, DP]``.

    The place of each of the four digits of 4 bits of each channel: its number among the nibbles, or else ``-2 - i`` if
    its lower half is the ``i``-th of the digits of 2 bits, where its upper half comes next, if it has one; -1 where
    there is none.
    """
    row = tl.program_id(0)
    report += row * _REPORT
    n = tl.load(report + _N)
    di, first, end = tl.arange(0, DP), row.to(tl.int64) * chunks, (n + CHUNK - 1) // CHUNK
    lows, highs = tl.full([DP], float("inf"), tl.float32), tl.full([DP], float("-inf"), tl.float32)
    totals, top = tl.zeros([DP], tl.float64), tl.full([], 0.0, tl.float32)
    for start in range(0, end, BC):
        ci = start + tl.arange(0, BC)
        at, inside = (first + ci)[:, None] * D + di[None, :], (ci < end)[:, None] & (di < D)[None, :]
        lows = tl.minimum(lows, tl.min(tl.load(low + at, mask=inside, other=float("inf")), 0))
        highs = tl.maximum(highs, tl.max(tl.load(high + at, mask=inside, other=float("-inf")), 0))
        totals += tl.sum(tl.load(total + at, mask=inside, other=0.0), 0)
        top = tl.maximum(top, tl.max(tl.load(peak + first + ci, mask=ci < end, other=0.0), 0))
    width = tl.load(key_bits + row * D + di, mask=di < D, other=0).to(tl.int32)
    scale, zero = _affine(lows, highs, largest_code(width))
    mean = (totals / tl.maximum(n, 1).to(tl.float64)).to(tl.float32).to(tl.float16)
    used = (n > 0) & (di < D)
    scale = tl.where(used & (width > 0), scale, 0.0).to(tl.float16)
    zero = tl.where(used, tl.where(width > 0, zero, mean), 0.0).to(tl.float16)
    tl.store(key_affine + (row * D + di) * 2, scale, mask=di < D)
    tl.store(key_affine + (row * D + di) * 2 + 1, zero, mask=di < D)
    alone, top_pair = (used & (width == 2)).to(tl.int32), (used & (width == 6)).to(tl.int32)
    pairs, digits = tl.sum(alone + top_pair, 0), tl.sum(tl.where(used, width // 4, 0), 0)
    nibbles, before = digits // 16 * 16, 0
    place += row * 4 * DP + di
    for k in tl.static_range(4):
        has = (used & (width >= (4 if k == 0 else 8 if k == 1 else 16))).to(tl.int32)
        digit = before + tl.cumsum(has, 0) - 1
        at = tl.where(digit < nibbles, digit, -2 - pairs - 2 * (digit - nibbles))
        at = tl.where(has > 0, at, -1)
        if k == 0:
            at = tl.where(alone > 0, -1 - tl.cumsum(alone, 0), at)
        if k == 1:
            at = tl.where(top_pair > 0, -1 - tl.sum(alone, 0) - tl.cumsum(top_pair, 0), at)
        tl.store(place + k * DP, at)
        before += tl.sum(has, 0)
    tl.store(report + _C, (pairs + 2 * digits + 15) // 16 * 16)
    tl.store(report + _A, nibbles)
    tl.store(report + _KE, _exponent(tl.max(_peaks(scale, zero, width), 0)))
    tl.store(report + _VE, _exponent(top))
