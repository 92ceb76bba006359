"""Kernels of `items`; `naive_items` says what they compute. A row is a head of a problem."""

from __future__ import annotations

import triton
import triton.language as tl

from .naive_items import LEAST_WEIGHT, NOTHING

_SIZES = ["T", "n", "most", "heads", "block", "short", "first", "parts"]  # no kernel of its own for each
_LEAST, _NOTHING = tl.constexpr(LEAST_WEIGHT), tl.constexpr(NOTHING)


@triton.jit(do_not_specialize=_SIZES)
def set_apart_kernel(token, pinned, weights, held, counts, T, most, BLOCK: tl.constexpr):
    """``weights``, ``held`` (bytes) and ``counts`` of one row."""
    row = tl.program_id(0).to(tl.int64)
    before = tl.zeros([], tl.int32)
    for start in range(0, T, BLOCK):
        ti = start + tl.arange(0, BLOCK)
        pin = (tl.load(pinned + row * T + ti, mask=ti < T, other=0) != 0).to(tl.int32)
        keep = (pin > 0) & (before + tl.cumsum(pin, 0) <= most)
        weight = tl.load(token + row * T + ti, mask=ti < T, other=0.0)
        tl.store(weights + row * T + ti, tl.where(keep, -1.0, weight), mask=ti < T)
        tl.store(held + row * T + ti, keep.to(tl.uint8), mask=ti < T)
        before += tl.sum(pin, 0)
    tl.store(counts + row, tl.minimum(before, most).to(tl.int64))


@triton.jit(do_not_specialize=_SIZES)
def block_sums_kernel(
    ranked, sums, totals, T, n, short, BLOCK: tl.constexpr, BN: tl.constexpr, PINNED: tl.constexpr
):  # fmt: skip
    """Weights of some blocks of one row, ``sums`` ``[P, h, n]``, and theirs together, ``totals`` ``[P, h, parts]``."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ni, bi = part * BN + tl.arange(0, BN), tl.arange(0, BLOCK)
    ti = ni[:, None] * BLOCK + bi[None, :] - short
    weight = tl.load(ranked + row * T + ti, mask=(ti >= 0) & (ti < T), other=-1.0)
    total = tl.sum(tl.maximum(weight, 0.0).to(tl.float64), 1) + _NOTHING
    if PINNED:
        heaviest = tl.sum(tl.where((bi == BLOCK - 1)[None, :], weight, 0.0), 1)
        total = tl.where(heaviest < 0, 0.0, total)
    total = tl.where(ni < n, total, 0.0)
    tl.store(sums + row * n + ni, total, mask=ni < n)
    tl.store(totals + row * tl.num_programs(0) + part, tl.sum(total, 0))


@triton.jit(do_not_specialize=_SIZES)
def shares_kernel(sums, totals, weight, mass, n, parts, BN: tl.constexpr, BP: tl.constexpr):
    """``weight`` and ``mass`` of one row; ``parts`` of ``totals`` are of its problem."""
    row, pi = tl.program_id(1) + tl.program_id(0).to(tl.int64) * tl.num_programs(1), tl.arange(0, BP)
    every = tl.zeros([BP], tl.float64)
    for start in range(0, parts, BP):
        at = tl.program_id(0) * parts + start + pi
        every += tl.load(totals + at, mask=start + pi < parts, other=0.0)
    total, before = tl.sum(every, 0), tl.zeros([], tl.float64)
    tl.store(mass + row * (n + 1), before)
    for start in range(0, n, BN):
        ni = start + tl.arange(0, BN)
        share = tl.load(sums + row * n + ni, mask=ni < n, other=0.0) / total
        share = tl.maximum(share, _LEAST, propagate_nan=tl.PropagateNan.ALL)  # all tokens may be pinned
        share = tl.where(ni < n, share, 0.0)
        tl.store(weight + row * n + ni, share, mask=ni < n)
        tl.store(mass + row * (n + 1) + 1 + ni, before + tl.cumsum(share, 0), mask=ni < n)
        before += tl.sum(share, 0)


@triton.jit(do_not_specialize=_SIZES)
def spread_kernel(
    boundary, width, order, bits, T, block, first, width_stride_p, width_stride_h, heads,
    S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``bits`` of some tokens of one row."""
    row, ti = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    width += (row // heads) * width_stride_p + (row % heads) * width_stride_h
    steps = tl.zeros([BLOCK], tl.int32)
    for step in tl.static_range(S):
        steps += (first + ti >= tl.load(boundary + row * S + step) * block).to(tl.int32)
    token = tl.load(order + row * T + ti, mask=ti < T, other=0)
    tl.store(bits + row * T + token, tl.load(width + steps, mask=ti < T, other=0.0).to(tl.uint8), mask=ti < T)
