"""Triton kernels that write the tensors of `Packed`, once `pack_measure_kernels` have said what goes where.

    code = round((x - zero) / scale)

in float32, division correctly rounded, ties to even, as `naive_pack.pack` has it. A program has one slot of each of
its octets or blocks at a time, for all channels: a word of nibbles takes shape in one register, one of 2-bit digits
is made of two of those, and nothing is exchanged between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pack_measure_kernels import largest_code, tile
from .packed import (
    CHANNEL_BITS,
    CODED4,
    CODED8,
    CODED16,
    COLUMN_START,
    COLUMNS,
    KEY_START,
    NIBBLES,
    PINNED,
    PINNED_START,
    TOKENS,
    VALUE_AFFINE_START,
    VALUE_EXPONENT,
    VALUE_START,
)

_N, _N4, _N8, _N16 = (tl.constexpr(i) for i in (TOKENS, CODED4, CODED8, CODED16))
_P, _C, _A, _COUNTS = (tl.constexpr(i) for i in (PINNED, COLUMNS, NIBBLES, VALUE_EXPONENT + 1))
_KEY, _VALUE, _COLUMN = (tl.constexpr(i) for i in (KEY_START, VALUE_START, COLUMN_START))
_AFFINE, _PINNED, _STARTS = (tl.constexpr(i) for i in (VALUE_AFFINE_START, PINNED_START, PINNED_START + 1))
_PLACE = tl.constexpr(1 << CHANNEL_BITS)  # what a place of 2 bits is in an entry of the key columns
_ROUND = tl.constexpr(1.5 * 2**23)  # adding it to a float32 below 2 ** 22 rounds to an integer, ties to even


@triton.jit
def _codes(x, scale, zero, largest):
    """Codes of ``x``, int32."""
    scale = scale.to(tl.float32)
    steps = tl.div_rn(x - zero.to(tl.float32), tl.where(scale > 0, scale, 1.0) + tl.zeros_like(x))
    steps = (steps + _ROUND) - _ROUND
    return tl.minimum(tl.maximum(steps, 0.0), largest).to(tl.int32)


@triton.jit
def keys_kernel(
    keys, stride_b, stride_h, stride_t, key_bits, counts, starts, token, key_affine, place, key_codes, key_columns, T,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The words of ``W`` octets of one row's keys, and its columns."""
    block, row = tl.program_id(0), tl.program_id(1)
    n = tl.load(counts + row * _COUNTS + _N)
    if block * W * 8 >= n:
        return
    columns, nibbles = tl.load(counts + row * _COUNTS + _C), tl.load(counts + row * _COUNTS + _A)
    keys += (row // H).to(tl.int64) * stride_b + (row % H).to(tl.int64) * stride_h
    token += row.to(tl.int64) * T
    place += row * 4 * DP
    di, wi = tl.arange(0, DP), block * W + tl.arange(0, W)
    width = tl.load(key_bits + row * D + di, mask=di < D, other=0).to(tl.int32)
    scale = tl.load(key_affine + (row * D + di) * 2, mask=di < D, other=0.0)[None, :]
    zero = tl.load(key_affine + (row * D + di) * 2 + 1, mask=di < D, other=0.0)[None, :]
    largest = largest_code(width)[None, :]
    out = key_codes + tl.load(starts + row * _STARTS + _KEY) + wi[:, None] * columns
    stored = wi < (n + 15) // 16 * 2
    for half in range(1 + tl.max((width == 16).to(tl.int32), 0)):  # digits 0 and 1, then 2 and 3 if there are any
        a0, b0 = tl.zeros([W, DP], tl.int32), tl.zeros([W, DP], tl.int32)
        a1, b1 = tl.zeros([W, DP], tl.int32), tl.zeros([W, DP], tl.int32)
        for j in tl.static_range(8):
            ok = wi * 8 + j < n
            x = tile(keys, tl.load(token + wi * 8 + j, mask=ok, other=0), stride_t, di, ok, D)
            code = tl.where(ok[:, None], _codes(x.to(tl.float32), scale, zero, largest), 0) >> (8 * half)
            if j < 4:
                a0 |= (code & 15) << (4 * j)
                a1 |= (code >> 4 & 15) << (4 * j)
            else:
                b0 |= (code & 15) << (4 * j - 16)
                b1 |= (code >> 4 & 15) << (4 * j - 16)
        _store_keys(out, nibbles, place + half * 2 * DP + di, a0, b0, stored, width > 2)
        _store_keys(out, nibbles, place + (half * 2 + 1) * DP + di, a1, b1, stored, width > 6)
    padding = columns - 16 + tl.arange(0, 16)
    is_padding = (padding >= tl.sum(width, 0) // 2) & (padding >= 0)
    nothing = tl.zeros([W, 16], tl.int16)
    tl.store(out + padding[None, :], nothing, mask=stored[:, None] & is_padding[None, :])
    if block == 0:
        key_columns += tl.load(starts + row * _STARTS + _COLUMN)
        for k in tl.static_range(4):
            at = tl.load(place + k * DP + di)
            pair, halved = nibbles - 2 - at, width > (2 if k == 0 else 6)
            tl.store(key_columns + at, (di + 2 * k * _PLACE).to(tl.int16), mask=at >= 0)
            tl.store(key_columns + pair, (di + 2 * k * _PLACE).to(tl.int16), mask=at < -1)
            tl.store(key_columns + pair + 1, (di + (2 * k + 1) * _PLACE).to(tl.int16), mask=(at < -1) & halved)
        tl.store(key_columns + padding - nibbles, tl.full([16], -1, tl.int16), mask=is_padding)


@triton.jit
def _store_keys(out, nibbles, place, first, second, stored, halved):
    """One digit of 4 bits of each channel as a nibble, or as two digits of 2 bits, but only one if not ``halved``."""
    at, stored = tl.load(place)[None, :], stored[:, None]
    tl.store(out + at, first.to(tl.int16), mask=stored & (at >= 0))
    tl.store(out + nibbles + at, second.to(tl.int16), mask=stored & (at >= 0))
    out += 2 * nibbles - 2 - at
    tl.store(out, _pairs(first, second).to(tl.int16), mask=stored & (at < -1))
    tl.store(out + 1, _pairs(first >> 2, second >> 2).to(tl.int16), mask=stored & (at < -1) & halved[None, :])


@triton.jit
def _pairs(first, second):
    """The word of the lower 2 bits of the nibbles in two words, in the order of ``PAIR_SHIFTS``; also two at once."""
    low = (first & 0x00330033) | (first >> 6 & 0x00CC00CC)
    return low | (second & 0x00330033) << 8 | (second & 0x33003300) << 2


@triton.jit
def values_kernel(
    values, stride_b, stride_h, stride_t, counts, starts, token, affine, value_codes, value_affine, T,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """``Q`` blocks of one row's slots, digits 0 and 1 or 2 and 3; ``value_codes`` as int32, words of both octets."""
    block, row, half = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, n16 = tl.load(counts + row * _COUNTS + _N), tl.load(counts + row * _COUNTS + _N16)
    if block * Q * 16 >= tl.where(half == 0, n, n16):
        return
    n4, n8 = tl.load(counts + row * _COUNTS + _N4), tl.load(counts + row * _COUNTS + _N8)
    values += (row // H).to(tl.int64) * stride_b + (row % H).to(tl.int64) * stride_h
    token += row.to(tl.int64) * T
    affine += row.to(tl.int64) * T * 2
    value_affine += tl.load(starts + row * _STARTS + _AFFINE) * 2
    ai = block * Q * 32 + tl.arange(0, Q * 32)
    mine = ai < tl.where(half == 0, 2 * n, 0)
    tl.store(value_affine + ai, tl.load(affine + ai, mask=mine), mask=mine)
    di, qi = tl.arange(0, DP), block * Q + tl.arange(0, Q)
    a0, b0 = tl.zeros([Q, DP], tl.int32), tl.zeros([Q, DP], tl.int32)
    a1, b1 = tl.zeros([Q, DP], tl.int32), tl.zeros([Q, DP], tl.int32)
    for j in tl.static_range(16):
        slot = qi * 16 + j
        ok = slot < n
        scale = tl.load(affine + slot * 2, mask=ok, other=0.0)
        zero = tl.load(affine + slot * 2 + 1, mask=ok, other=0.0)
        width = tl.where(slot < n16, 16, tl.where(slot < n8, 8, tl.where(slot < n4, 4, 2)))
        x = tile(values, tl.load(token + slot, mask=ok, other=0), stride_t, di, ok, D)
        code = _codes(x.to(tl.float32), scale[:, None], zero[:, None], largest_code(width)[:, None])
        code = tl.where(ok[:, None], code, 0) >> (8 * half)
        if j // 4 % 2 == 0:
            a0 |= (code & 15) << (j // 8 * 16 + j % 4 * 4)
            a1 |= (code >> 4 & 15) << (j // 8 * 16 + j % 4 * 4)
        else:
            b0 |= (code & 15) << (j // 8 * 16 + j % 4 * 4)
            b1 |= (code >> 4 & 15) << (j // 8 * 16 + j % 4 * 4)
    b, b4, b8, b16 = (n + 15) // 16, (n4 + 15) // 16, (n8 + 15) // 16, (n16 + 15) // 16
    end0, end1 = tl.where(half == 0, b4, b16), tl.where(half == 0, b8, b16)
    inside, value_codes = (di < D)[None, :], value_codes + tl.load(starts + row * _STARTS + _VALUE) // 2
    out = value_codes + half * (b4 + b8) * 2 * D + qi[:, None] * 2 * D + di[None, :]
    tl.store(out, a0, mask=(qi < end0)[:, None] & inside)
    tl.store(out + D, b0, mask=(qi < end0)[:, None] & inside)
    tl.store(out + end0 * 2 * D, a1, mask=(qi < end1)[:, None] & inside)
    tl.store(out + end0 * 2 * D + D, b1, mask=(qi < end1)[:, None] & inside)
    paired = (qi >= b4) & (qi < tl.where(half == 0, b, 0))
    out = value_codes + (b4 + b8 + 2 * b16) * 2 * D + (qi - b4)[:, None] * D + di[None, :]
    tl.store(out, _pairs(a0, b0), mask=paired[:, None] & inside)


@triton.jit
def pinned_kernel(
    keys, key_stride_b, key_stride_h, key_stride_t, values, value_stride_b, value_stride_h, value_stride_t,
    counts, starts, token, pinned_keys, pinned_values, T,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """``BT`` of one row's pinned tokens. Data as integers."""
    block, row = tl.program_id(0), tl.program_id(1)
    n, p = tl.load(counts + row * _COUNTS + _N), tl.load(counts + row * _COUNTS + _P)
    if block * BT >= p:
        return
    keys += (row // H).to(tl.int64) * key_stride_b + (row % H).to(tl.int64) * key_stride_h
    values += (row // H).to(tl.int64) * value_stride_b + (row % H).to(tl.int64) * value_stride_h
    di, pi = tl.arange(0, DP), block * BT + tl.arange(0, BT)
    ti = tl.load(token + row.to(tl.int64) * T + n + pi, mask=pi < p, other=0)
    at = (tl.load(starts + row * _STARTS + _PINNED) + pi)[:, None] * D + di[None, :]
    stored = (pi < p)[:, None] & (di < D)[None, :]
    tl.store(pinned_keys + at, tile(keys, ti, key_stride_t, di, pi < p, D), mask=stored)
    tl.store(pinned_values + at, tile(values, ti, value_stride_t, di, pi < p, D), mask=stored)
