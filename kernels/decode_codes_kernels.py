"""What decode attention does with codes: 2-bit planes under a mask as operands of the tensor cores.

A 16-bit word holds one code of each of eight tokens. Two bits of it under a mask, read as float16, are a
subnormal number, ``code * 4^j * 2^-24`` exactly: no shift and no conversion for the four tokens of each byte.
Whoever multiplies pays the powers of two back.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter has no inline assembly; there the masks are plain operations on 16-bit integers.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, c):
    if _INTERPRETED:  # which multiplies bfloat16 by its bit patterns
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    else:
        return tl.dot(a, b, c)


@triton.jit
def codes(words, MASK: tl.constexpr, PAIRS: tl.constexpr):
    """Bits ``MASK`` of every word as a float16 (subnormal), two words an instruction (``PAIRS``: mask of both)."""
    if _INTERPRETED:
        return (words & MASK).to(tl.int16).to(tl.float16, bitcast=True)
    asm: tl.constexpr = "and.b32 $0, $1, " + PAIRS + ";"
    return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def upper(words):
    """The upper byte of every word in its lower byte; what the upper byte holds then is arbitrary."""
    if _INTERPRETED:
        return ((words.to(tl.int32) & 0xFFFF) >> 8).to(tl.int16)
    return tl.inline_asm_elementwise("shr.u32 $0, $1, 8;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)


@triton.jit
def multiply(w, q, c0, c1, c2, c3):
    """``c_j + codes_j(w) @ q`` for the four tokens of the lower byte; returns the four sums."""
    c0 = dot(codes(w, 3, "0x00030003"), q, c0)
    c1 = dot(codes(w, 12, "0x000c000c"), q, c1)
    c2 = dot(codes(w, 48, "0x00300030"), q, c2)
    c3 = dot(codes(w, 192, "0x00c000c0"), q, c3)
    return c0, c1, c2, c3


@triton.jit
def accumulate(w, a0, a1, a2, a3, acc):
    """``acc + sum_j codes_j(w) @ a_j`` for the four tokens of the lower byte."""
    acc = dot(codes(w, 3, "0x00030003"), a0, acc)
    acc = dot(codes(w, 12, "0x000c000c"), a1, acc)
    acc = dot(codes(w, 48, "0x00300030"), a2, acc)
    return dot(codes(w, 192, "0x00c000c0"), a3, acc)


@triton.jit
def hide(s, slot, n, J: tl.constexpr):
    return tl.where((slot + J < n)[:, None], s, float("-inf"))


@triton.jit
def load_affine(affine, slot, coded, J: tl.constexpr):
    """Scale and zero point of values as they are stored: float16 pairs, scale low, zero high."""
    return tl.load(affine + slot + J, mask=slot + J < coded, other=0)


@triton.jit
def scale_of(affine):
    """Scale of a float16 pair, float32."""
    return (affine & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def zero_of(affine):
    """Zero point of a float16 pair, float32."""
    return (affine >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def weigh(p, affine, factor, zeros):
    """Probabilities times the values' scales, float16, and ``zeros`` plus probabilities times zero points."""
    return (p * (scale_of(affine) * factor)[:, None]).to(tl.float16), zeros + p * zero_of(affine)[:, None]


@triton.jit
def split_high_low(p, dtype: tl.constexpr):
    """``p`` as a sum of two numbers of ``dtype``: bfloat16 alone would lose more than the codes do."""
    high = p.to(dtype)
    return high, (p - high.to(tl.float32)).to(dtype)


@triton.jit
def load_query(q_ptr, ni, di, strides_h, strides_q, NQ: tl.constexpr, Q: tl.constexpr, D: tl.constexpr):
    """Query rows ``g * Q + i`` of a KV head as columns, ``[DP, N]``."""
    at = (ni // Q) * strides_h + (ni % Q) * strides_q
    return tl.load(q_ptr + at[None, :] + di[:, None], mask=(ni < NQ)[None, :] & (di < D)[:, None], other=0.0)


@triton.jit
def key_words(key_codes, word, column, n, C):
    """Words ``[W, columns]`` of some key columns."""
    mask = (word * 8 < n)[:, None] & (column < C)[None, :]
    return tl.load(key_codes + word.to(tl.int64)[:, None] * C + column[None, :], mask=mask, other=0)


@triton.jit
def value_words(plane, pair, d2, blocks, D: tl.constexpr):
    """Words of one plane of values, ``[W / 2, 2 * DP]``: a row holds two words of each channel."""
    mask = (pair < blocks)[:, None] & (d2 < 2 * D)[None, :]
    return tl.load(plane + pair.to(tl.int64)[:, None] * (2 * D) + d2[None, :], mask=mask, other=0)


@triton.jit
def across(v, W: tl.constexpr, DP: tl.constexpr):
    """The words of `value_words` with channels as rows, ``[DP, W]``."""
    return tl.reshape(tl.permute(tl.reshape(v, [W // 2, DP, 2]), (1, 0, 2)), [DP, W])


@triton.jit
def fold_query(q_ptr, q_at, key_columns, key_affine, norm, ni, at, C, NQ: tl.constexpr):
    """Queries times the scale of each key column and the weight of its plane, ``[columns, N]`` float16."""
    column = tl.load(key_columns + at, mask=at < C, other=-1).to(tl.int32)
    channel = column & 255
    scale = scale_of(tl.load(key_affine + channel, mask=column >= 0, other=0))
    scale *= tl.exp2(2.0 * (column >> 8).to(tl.float32))
    q = tl.load(q_ptr + q_at[None, :] + channel[:, None], mask=(ni < NQ)[None, :] & (column >= 0)[:, None], other=0.0)
    return (q.to(tl.float32) * norm[None, :] * scale[:, None]).to(tl.float16)
