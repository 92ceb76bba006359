"""Kernels of `waterlevel`; `naive_waterlevel` says what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

_SIZES = ["n", "points", "heads", "levels", "factors"]  # no kernel of its own for each
_LAST = tl.constexpr(1 << 30)


@triton.jit
def lighter(weight, bar, n, STEPS: tl.constexpr):
    """How many of ``n`` ascending numbers, or NaN, lie below each of ``bar``, int32; ``n < 2 ** STEPS``."""
    count = tl.zeros_like(bar).to(tl.int32)
    for step in range(STEPS):
        probe = count + (1 << (STEPS - 1 - step))
        reached = tl.load(weight + probe - 1, mask=probe <= n, other=float("inf")) >= bar
        count = tl.where(reached | (probe > n), count, probe)
    return count


@triton.jit(do_not_specialize=_SIZES)
def best_points_kernel(
    weight, mass, bar, price, gain, limit, whole, loss, water, point, bits, n, points, heads, levels,
    water_stride_p, stride_p, stride_h, stride_j,
    S: tl.constexpr, SP: tl.constexpr, BL: tl.constexpr, BJ: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Some water levels of one head: ``point`` and ``bits`` ``[P, h, L]``."""
    head = tl.program_id(1).to(tl.int64)  # of all problems
    li, si = tl.program_id(0) * BL + tl.arange(0, BL), tl.arange(0, SP)
    level = tl.load(water + (head // heads) * water_stride_p + li, mask=li < levels, other=1.0)
    columns = (head // heads) * stride_p + (head % heads) * stride_h
    weight, mass = weight + head * n, mass + head * (n + 1)
    best, first = tl.full([BL], float("inf"), tl.float64), tl.zeros([BL], tl.int32)
    taken = tl.zeros([BL], tl.float64)
    for start in range(0, points, BJ):
        ji = start + tl.arange(0, BJ)
        at, inside = columns + ji[:, None] * stride_j + si[None, :], (ji < points)[:, None] & (si < S)[None, :]
        earned = tl.load(bar + at, mask=inside, other=0.0)[None, :, :] * level[:, None, None]  # [BL, BJ, SP]
        bound = tl.load(limit + at, mask=inside, other=0.0).to(tl.int32)[None, :, :]
        boundary = tl.minimum(lighter(weight, earned, n, STEPS), bound)
        lost = tl.sum(tl.load(mass + boundary) * tl.load(gain + at, mask=inside, other=0.0)[None, :, :], 2)  # [BL, BJ]
        saved = tl.sum(boundary.to(tl.float64) * tl.load(price + at, mask=inside, other=0.0)[None, :, :], 2)
        spent = tl.load(whole + head * points + ji, mask=ji < points, other=0.0)[None, :] - saved
        lost += tl.load(loss + head * points + ji, mask=ji < points, other=float("inf"))[None, :]
        total = lost + level[:, None] * spent
        least = tl.min(total, 1)
        first_of = (total == least[:, None]) | (total != total)  # as PyTorch has it, NaN is the least
        index = tl.min(tl.where(first_of, ji[None, :], _LAST), 1)
        better = (least < best) | (start == 0)
        taken = tl.where(better, tl.sum(tl.where(ji[None, :] == index[:, None], spent, 0.0), 1), taken)
        best, first = tl.where(better, least, best), tl.where(better, index, first)
    tl.store(point + head * levels + li, tl.minimum(first, points - 1).to(tl.int64), mask=li < levels)
    tl.store(bits + head * levels + li, taken, mask=li < levels)


@triton.jit(do_not_specialize=_SIZES)
def bracket_kernel(
    point, bits, available, water, factor, chosen, around, heads, levels, factors, water_stride_p,
    LP: tl.constexpr, MP: tl.constexpr, WANTED: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """One problem: ``chosen`` ``[P, h, WANTED]`` and ``around`` ``[P, M]``."""
    problem = tl.program_id(0).to(tl.int64)
    li, mi = tl.arange(0, LP), tl.arange(0, MP)
    at = problem * heads * levels
    total = tl.zeros([LP], tl.float64)  # of whole numbers: exact
    for head in range(heads):
        total += tl.load(bits + at + head * levels + li, mask=li < levels, other=0.0)
    affordable = (total <= tl.load(available + problem)) & (li > 0) & (li < levels - 1)
    above = tl.sum(affordable.to(tl.int32), 0)
    level = tl.load(water + problem * water_stride_p + above)
    tl.store(around + problem * factors + mi, level * tl.load(factor + mi, mask=mi < factors), mask=mi < factors)
    for start in range(0, heads, BH):
        hi = start + tl.arange(0, BH)
        for i in tl.static_range(WANTED):
            index = tl.load(point + at + hi * levels + above + i, mask=hi < heads, other=0)
            tl.store(chosen + (problem * heads + hi) * WANTED + i, index, mask=hi < heads)
