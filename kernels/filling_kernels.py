"""Kernels of `filling`; `naive_filling` says what they compute. ``R = h * S`` rows of a problem, a step each."""

from __future__ import annotations

import triton
import triton.language as tl

from .naive_filling import AHEAD, NEVER, PASSES
from .waterlevel_kernels import lighter

_SIZES = ["n", "rows", "levels"]  # no kernel of its own for each
_AHEAD, _NEVER, _PASSES = tl.constexpr(AHEAD), tl.constexpr(NEVER), tl.constexpr(PASSES)


@triton.jit
def _column(column, row, rows, stride_h, S: tl.constexpr):
    """A column of the steps at some rows; 0 beyond the last."""
    return tl.load(column + (row // S).to(tl.int64) * stride_h + row % S, mask=row < rows, other=0.0)


@triton.jit
def _boundary(
    weight, bar, limit, level, row, rows, n, stride_h, S: tl.constexpr, STEPS: tl.constexpr, LIMITED: tl.constexpr
):
    """Boundaries of rows at levels ``[1, BL]``, ``[BR, BL]`` int32; 0 beyond the last row."""
    earned = _column(bar, row, rows, stride_h, S)[:, None] * level
    head = tl.where(row < rows, row // S, 0).to(tl.int64)
    boundary = lighter(weight + (head * n)[:, None], earned, n, STEPS)
    if LIMITED:
        bound = _column(limit, row, rows, stride_h, S).to(tl.int32)
        boundary = tl.minimum(boundary, bound[:, None])
    return boundary


@triton.jit(do_not_specialize=_SIZES)
def saved_kernel(
    weight, bar, price, limit, water, saved, n, rows, levels, water_stride_p, stride_p, stride_h,
    S: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, STEPS: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """``saved`` ``[P, L]`` at some water levels of one problem."""
    problem, li = tl.program_id(1).to(tl.int64), tl.program_id(0) * BL + tl.arange(0, BL)
    weight += problem * (rows // S) * n
    columns = problem * stride_p
    level = tl.load(water + problem * water_stride_p + li, mask=li < levels, other=1.0)[None, :]
    total = tl.zeros([BL], tl.float64)  # of whole numbers: exact
    for start in range(0, rows, BR):
        row = start + tl.arange(0, BR)
        boundary = _boundary(weight, bar + columns, limit + columns, level, row, rows, n, stride_h, S, STEPS, LIMITED)
        total += tl.sum(boundary.to(tl.float64) * _column(price + columns, row, rows, stride_h, S)[:, None], 0)
    tl.store(saved + problem * levels + li, total, mask=li < levels)


@triton.jit(do_not_specialize=_SIZES)
def settled_kernel(
    weight, bar, limit, water, saved, need, boundary, n, rows, levels, water_stride_p, stride_p, stride_h,
    S: tl.constexpr, BR: tl.constexpr, LP: tl.constexpr, STEPS: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """``boundary`` ``[P, R]`` of one problem."""
    problem, li, ends = tl.program_id(0).to(tl.int64), tl.arange(0, LP), tl.arange(0, 2)
    saved, wanted = saved + problem * levels, tl.load(need + problem)
    enough = tl.load(saved + li, mask=li < levels, other=0.0) >= wanted
    above = tl.sum((enough & (li > 0) & (li < levels - 1)).to(tl.int32), 0)
    most, least = tl.load(saved + above), tl.load(saved + above + 1)
    share = tl.minimum(tl.maximum((most - wanted) / tl.maximum(most - least, 1.0), 0.0), 1.0)
    level = tl.load(water + problem * water_stride_p + above + ends)[None, :]
    weight += problem * (rows // S) * n
    columns = problem * stride_p
    for start in range(0, rows, BR):
        row = start + tl.arange(0, BR)
        both = _boundary(weight, bar + columns, limit + columns, level, row, rows, n, stride_h, S, STEPS, LIMITED)
        high = tl.sum(tl.where((ends == 0)[None, :], both, 0), 1)
        low = tl.sum(tl.where((ends == 1)[None, :], both, 0), 1)
        between = high - ((high - low).to(tl.float64) * share).to(tl.int32)
        tl.store(boundary + problem * rows + row, between.to(tl.int64), mask=row < rows)


@triton.jit
def _worth(weight, rate, boundary, next_, rows, n, stride_h, S: tl.constexpr):
    """Gain per bit of the steps ``next_``, ``AHEAD`` for each row; and the item that each is of."""
    row = next_ // _AHEAD
    item = tl.load(boundary + row, mask=row < rows, other=0).to(tl.int32) - next_ % _AHEAD - 1
    at = weight + (row // S).to(tl.int64) * n + tl.maximum(item, 0)
    return tl.load(at, mask=row < rows, other=0.0) * _column(rate, row, rows, stride_h, S), item


@triton.jit(do_not_specialize=_SIZES)
def rank_kernel(
    weight, toll, rate, boundary, rank, cost, n, rows, stride_p, stride_h, S: tl.constexpr, BI: tl.constexpr
):
    """``rank`` ``[P, R * AHEAD]`` of some next steps by falling worth, and by rank what each costs, ``cost``."""
    problem, own = tl.program_id(1).to(tl.int64), tl.program_id(0) * BI + tl.arange(0, BI)
    weight, boundary, columns = weight + problem * (rows // S) * n, boundary + problem * rows, problem * stride_p
    steps = rows * _AHEAD
    worth, item = _worth(weight, rate + columns, boundary, own, rows, n, stride_h, S)
    place = tl.zeros([BI], tl.int32)
    for start in range(0, steps, BI):
        other = start + tl.arange(0, BI)
        rival, _ = _worth(weight, rate + columns, boundary, other, rows, n, stride_h, S)
        earlier = (rival[None, :] == worth[:, None]) & (other[None, :] < own[:, None])
        ahead = ((rival[None, :] > worth[:, None]) | earlier) & (other < steps)[None, :]
        place += tl.sum(ahead.to(tl.int32), 1)
    row = own // _AHEAD
    before = tl.load(boundary + row - 1, mask=(row < rows) & (row % S > 0), other=0)
    price = tl.where(item < before, _NEVER, _column(toll + columns, row, rows, stride_h, S))
    tl.store(rank + problem * steps + own, place, mask=own < steps)
    tl.store(cost + problem * steps + place, price, mask=own < steps)


@triton.jit(do_not_specialize=_SIZES)
def spend_kernel(
    price, boundary, need, rank, cost, out, rows, stride_p, stride_h,
    S: tl.constexpr, BR: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """``out`` ``[P, R]``, the boundaries of one problem after what is left is spent."""
    problem, ni, ai = tl.program_id(0).to(tl.int64), tl.arange(0, NP), tl.arange(0, _AHEAD)
    boundary, out, steps = boundary + problem * rows, out + problem * rows, rows * _AHEAD
    rank, cost = rank + problem * steps, cost + problem * steps
    saved = tl.zeros([BR], tl.float64)
    for start in range(0, rows, BR):
        row = start + tl.arange(0, BR)
        step = _column(price + problem * stride_p, row, rows, stride_h, S)
        saved += tl.load(boundary + row, mask=row < rows, other=0).to(tl.float64) * step
    left = tl.sum(saved, 0) - tl.load(need + problem)
    dear = tl.load(cost + ni, mask=ni < steps, other=_NEVER)
    for _ in tl.static_range(_PASSES):
        tried = tl.where(dear <= left, dear, 0.0)
        bought = tl.where(tl.cumsum(tried, 0) <= left, tried, 0.0)
        left -= tl.sum(bought, 0)
        dear -= bought
    tl.store(cost + ni, dear, mask=ni < steps)
    tl.debug_barrier()  # each thread reads what others wrote
    for start in range(0, rows, BR):
        row = start + tl.arange(0, BR)
        inside = (row < rows)[:, None]
        place = tl.load(rank + row[:, None] * _AHEAD + ai[None, :], mask=inside, other=0)
        made = (tl.load(cost + place, mask=inside, other=1.0) == 0.0).to(tl.int64)
        tl.store(out + row, tl.load(boundary + row, mask=row < rows, other=0) - tl.sum(made, 1), mask=row < rows)
