"""Kernels of `positions`; `naive_positions` says what they list. A span is a part of a row."""

from __future__ import annotations

import triton
import triton.language as tl

_SIZES = ["T", "bytes", "kept_total", "pinned_total"]  # no kernel of its own for each


@triton.jit
def _of(bits, pinned, row, ti, T):
    """Widths of tokens, 0 for pinned ones, and whether they are pinned, int32."""
    inside = ti < T
    pin = (tl.load(pinned + row * T + ti, mask=inside, other=0) != 0).to(tl.int32)
    width = tl.load(bits + row * T + ti, mask=inside, other=0).to(tl.int32)
    return tl.where(pin > 0, 0, width), pin


@triton.jit(do_not_specialize=_SIZES)
def count_kernel(bits, pinned, counts, mask, T, bytes, SPAN: tl.constexpr):
    """``counts`` ``[2, R * spans]`` of one span, kept and pinned tokens, and its ``mask`` ``[R, bytes]``."""
    row, span = tl.program_id(1).to(tl.int64), tl.program_id(0)
    bi, ki = span * (SPAN // 8) + tl.arange(0, SPAN // 8), tl.arange(0, 8)
    width, pin = _of(bits, pinned, row, bi[:, None] * 8 + ki[None, :], T)
    kept = (width > 0).to(tl.int32)
    tl.store(mask + row * bytes + bi, tl.sum(kept << ki[None, :], 1).to(tl.uint8), mask=bi < bytes)
    at, spans = row * tl.num_programs(0) + span, tl.num_programs(0) * tl.num_programs(1)
    tl.store(counts + at, tl.sum(tl.sum(kept, 1), 0))
    tl.store(counts + spans + at, tl.sum(tl.sum(pin, 1), 0))


@triton.jit(do_not_specialize=_SIZES)
def list_kernel(
    bits, pinned, counts, classes, places, T, kept_total, pinned_total, SPAN: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Classes of a span's kept tokens, a byte each, and positions of its pinned ones."""
    row, span = tl.program_id(1).to(tl.int64), tl.program_id(0)
    own, spans = row * tl.num_programs(0) + span, tl.num_programs(0) * tl.num_programs(1)
    kept_before, pinned_before = tl.zeros([BC], tl.int32), tl.zeros([BC], tl.int32)
    for start in range(0, own, BC):
        ci = start + tl.arange(0, BC)
        kept_before += tl.load(counts + ci, mask=ci < own, other=0)
        pinned_before += tl.load(counts + spans + ci, mask=ci < own, other=0)
    ti = span * SPAN + tl.arange(0, SPAN)
    width, pin = _of(bits, pinned, row, ti, T)
    kept = (width > 0).to(tl.int32)
    slot = tl.sum(kept_before, 0) + tl.cumsum(kept, 0) - 1
    class_ = tl.where(width == 8, 1, tl.where(width == 4, 2, tl.where(width == 2, 3, 0)))
    tl.store(classes + slot, class_.to(tl.uint8), mask=(kept > 0) & (slot < kept_total))
    slot = tl.sum(pinned_before, 0) + tl.cumsum(pin, 0) - 1
    tl.store(places + slot, ti, mask=(pin > 0) & (slot < pinned_total))


@triton.jit(do_not_specialize=_SIZES)
def fold_kernel(classes, folded, bytes, kept_total, BLOCK: tl.constexpr):
    """``folded`` ``[bytes]``: four classes each, the first in the lowest bits."""
    bi, ki = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, 4)
    at = bi[:, None] * 4 + ki[None, :]
    class_ = tl.load(classes + at, mask=at < kept_total, other=0).to(tl.int32)
    tl.store(folded + bi, tl.sum(class_ << (2 * ki)[None, :], 1).to(tl.uint8), mask=bi < bytes)
