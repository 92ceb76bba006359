"""What decode attention does with codes: digits under a mask as operands of the tensor cores.

A 16-bit word holds nibbles of four tokens or 2-bit digits of eight. One digit of it under a mask, read as float16, is
a subnormal number, ``digit * 2^shift * 2^-24`` exactly: no shift and no conversion for those in the lower byte.
Whoever multiplies pays the powers of two back.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from .packed import CHANNEL_BITS

# The interpreter has no inline assembly; there the masks are plain operations on 16-bit integers.
_CHANNEL_BITS, _CHANNEL = tl.constexpr(CHANNEL_BITS), tl.constexpr((1 << CHANNEL_BITS) - 1)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, c):
    if INTERPRETED:  # which multiplies bfloat16 by its bit patterns
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    else:
        return tl.dot(a, b, c)


@triton.jit
def codes(words, MASK: tl.constexpr, PAIRS: tl.constexpr):
    """Bits ``MASK`` of every word as a float16 (subnormal), two words an instruction (``PAIRS``: mask of both)."""
    if INTERPRETED:
        return (words & MASK).to(tl.int16).to(tl.float16, bitcast=True)
    asm: tl.constexpr = "and.b32 $0, $1, " + PAIRS + ";"
    return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def down(words, BITS: tl.constexpr):
    """Every word shifted right by ``BITS``, 8 or 2; as many upper bits are arbitrary then."""
    if INTERPRETED:
        return ((words.to(tl.int32) & 0xFFFF) >> BITS).to(tl.int16)
    asm: tl.constexpr = "shr.u32 $0, $1, 8;" if BITS == 8 else "shr.u32 $0, $1, 2;"
    return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)


@triton.jit
def even(words, BITS: tl.constexpr):
    """The digit of ``BITS`` bits, 4 or 2, that stands lowest in every word."""
    if BITS == 4:
        return codes(words, 0x0F, "0x000f000f")
    else:
        return codes(words, 0x03, "0x00030003")


@triton.jit
def odd(words, BITS: tl.constexpr):
    """The digit that stands 4 bits higher, 16 times too large."""
    if BITS == 4:
        return codes(words, 0xF0, "0x00f000f0")
    else:
        return codes(words, 0x30, "0x00300030")


@triton.jit
def multiply(w, q, c0, c1, c2, c3, BITS: tl.constexpr):
    """``c_j + digits_j(w) @ q`` for a word's four nibbles, or the four 2-bit digits of its lower byte.

    Odd sums are 16 times too large.
    """
    c0 = dot(even(w, BITS), q, c0)
    c1 = dot(odd(w, BITS), q, c1)
    w = down(w, 8 if BITS == 4 else 2)
    c2 = dot(even(w, BITS), q, c2)
    c3 = dot(odd(w, BITS), q, c3)
    return c0, c1, c2, c3


@triton.jit
def accumulate(w, a0, a1, a2, a3, acc, BITS: tl.constexpr):
    """``acc + sum_j digits_j(w) @ a_j`` for the same digits, those of odd ``j`` 16 times too large."""
    acc = dot(even(w, BITS), a0, acc)
    acc = dot(odd(w, BITS), a1, acc)
    w = down(w, 8 if BITS == 4 else 2)
    acc = dot(even(w, BITS), a2, acc)
    return dot(odd(w, BITS), a3, acc)


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
def key_words(key_codes, word, column, n, end, C):
    """Words ``[W, columns]`` of some key columns, those before ``end``, of the ``C`` words of each octet."""
    mask = (word * 8 < n)[:, None] & (column < end)[None, :]
    return tl.load(key_codes + word.to(tl.int64)[:, None] * C + column[None, :], mask=mask, other=0)


@triton.jit
def key_nibbles(key_codes, octet, column, n, A, C, f, s0, s1, s2, s3, s4, s5, s6, s7):
    """Sums of eight tokens plus what some of the ``A`` nibble columns, with folded queries ``f``, add to them."""
    lower = key_words(key_codes, octet, column, n, A, C)
    s0, s1, s2, s3 = multiply(lower, f, s0, s1, s2, s3, 4)
    later = key_words(key_codes + A, octet, column, n, A, C)
    s4, s5, s6, s7 = multiply(later, f, s4, s5, s6, s7, 4)
    return s0, s1, s2, s3, s4, s5, s6, s7


@triton.jit
def key_pairs(key_codes, octet, column, n, S, C, f, s0, s1, s2, s3, s4, s5, s6, s7):
    """The same of some of the ``S`` columns of 2 bits."""
    w = key_words(key_codes, octet, column, n, S, C)
    s0, s1, s2, s3 = multiply(w, f, s0, s1, s2, s3, 2)
    s4, s5, s6, s7 = multiply(down(w, 8), f, s4, s5, s6, s7, 2)
    return s0, s1, s2, s3, s4, s5, s6, s7


@triton.jit
def value_words(plane, block, d2, first, end, stride, D: tl.constexpr):
    """Words of blocks ``first`` to ``end`` of a plane of values, ``[W / 2, 2 * DP]``: two octets of each channel."""
    mask = ((block >= first) & (block < end))[:, None] & (d2 < 2 * D)[None, :]
    return tl.load(plane + block.to(tl.int64)[:, None] * stride + d2[None, :], mask=mask, other=0)


@triton.jit
def across(v, W: tl.constexpr, DP: tl.constexpr):
    """The words of `value_words` with channels as rows, ``[DP, W]``."""
    return tl.reshape(tl.permute(tl.reshape(v, [W // 2, DP, 2]), (1, 0, 2)), [DP, W])


@triton.jit
def column_scales(key_columns, key_affine, at, end):
    """Channel of each key column, and its scale times the weight of its digit; 0 for padding."""
    column = tl.load(key_columns + at, mask=at < end, other=-1).to(tl.int32)
    channel = tl.where(column >= 0, column & _CHANNEL, 0)
    scale = scale_of(tl.load(key_affine + channel, mask=column >= 0, other=0))
    return channel, scale * tl.exp2(2.0 * (column >> _CHANNEL_BITS).to(tl.float32))


@triton.jit
def fold_query(q_ptr, q_at, channel, scale, norm, ni, NQ: tl.constexpr):
    """Queries times what `column_scales` gives, ``[columns, N]`` float16."""
    q = tl.load(q_ptr + q_at[None, :] + channel[:, None], mask=(ni < NQ)[None, :], other=0.0)
    return (q.to(tl.float32) * norm[None, :] * scale[:, None]).to(tl.float16)


@triton.constexpr_function
def power_of_2(n):
    """The least power of two that is not below ``n``. SGLang puts another ``triton.next_power_of_2`` in place of
    Triton's, which kernels cannot call."""
    return 1 << (n - 1).bit_length()


@triton.jit
def prefetch(words, first, count, end, LINES: tl.constexpr):
    """Ask for ``count`` words from ``first`` on, of those before ``end``: into the L2 cache, without waiting."""
    if LINES > 0 and not INTERPRETED:
        line = tl.arange(0, LINES) * 64
        wanted = (line < count) & (first + line < end)
        asm: tl.constexpr = "{.reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0;}"
        tl.inline_asm_elementwise(
            asm, "=r,l,r", [words + (first + line), wanted.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )
