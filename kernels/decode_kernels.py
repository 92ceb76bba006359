"""Decode attention straight from packed codes: one launch over every zone of the cache, one that merges.

    o = sum_t p_t v_t / sum_t p_t,    p_t = 2^(x_t - max x),    x_t = scale * log2(e) * q k_t

`decode_packed_kernels` has the zone of the codes. `naive_decode.attend` is the same in plain PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode_codes_kernels import dot, load_query, split_high_low
from .decode_packed_kernels import has_more_columns, packed_zone
from .decode_plan import PACKED_ZONE, PINNED_ZONE
from .packed import PINNED_START
from .rotation_kernels import turn

_PACKED, _PINNED, _STARTS = tl.constexpr(PACKED_ZONE), tl.constexpr(PINNED_ZONE), tl.constexpr(PINNED_START + 1)


@triton.jit
def _raw_tokens(pages, start, end, BT: tl.constexpr, PAGED: tl.constexpr):
    """Where the ``BT`` tokens from ``start`` on are, of those before ``end``."""
    ti = start + tl.arange(0, BT)
    return tl.load(pages + ti, mask=ti < end, other=0) if PAGED else ti


@triton.jit
def _raw_zone(
    q_ptr, q_stride_h, q_stride_q, keys, values, stride, pages, begin, end, ni, logit_scale,
    NQ: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr,
    PAGED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """16-bit tokens ``begin`` to ``end``, for the query rows ``ni``; returns what `packed_zone` does.

    Where they are is what ``pages`` says (``PAGED``), or one after the other.
    """
    if PDL:
        gdc_wait()
    di, ti = tl.arange(0, DP), tl.arange(0, BT)
    q = load_query(q_ptr, ni, di, q_stride_h, q_stride_q, NQ, Q, D).to(keys.dtype.element_ty)  # [DP, N]
    acc = tl.zeros([DP, N], tl.float32)
    total = tl.zeros([N], tl.float32)
    top = tl.full([N], float("-inf"), tl.float32)
    token = _raw_tokens(pages, begin, end, BT, PAGED)
    at = token.to(tl.int64)[:, None] * stride + di[None, :]
    mask = (begin + ti < end)[:, None] & (di < D)[None, :]
    k = tl.load(keys + at, mask=mask, other=0.0)  # [BT, DP]
    v = tl.load(values + at, mask=mask, other=0.0)
    token = _raw_tokens(pages, begin + BT, end, BT, PAGED)
    for start in range(begin, end, BT):
        s = dot(k, q, tl.zeros([BT, N], tl.float32)) * logit_scale  # [BT, N]
        s = tl.where((start + ti < end)[:, None], s, float("-inf"))
        # What comes next is asked for as soon as the registers of these keys and values are free: some are always on
        # the way, or the zone reads at three quarters of the speed.
        at = token.to(tl.int64)[:, None] * stride + di[None, :]
        mask = (start + BT + ti < end)[:, None] & (di < D)[None, :]
        k = tl.load(keys + at, mask=mask, other=0.0)
        token = _raw_tokens(pages, start + 2 * BT, end, BT, PAGED)
        new = tl.maximum(top, tl.max(s, 0))
        shrink = tl.exp2(top - new)
        top = new
        p = tl.exp2(s - top[None, :])
        total = total * shrink + tl.sum(p, 0)
        high, low = split_high_low(p, v.dtype)
        held = tl.trans(v)
        acc = dot(held, low, dot(held, high, acc * shrink[None, :]))
        v = tl.load(values + at, mask=mask, other=0.0)
    return acc, top, total


@triton.jit
def attend_kernel(
    q_ptr, q_stride_b, q_stride_h, q_stride_q,
    key_codes, key_columns, key_affine, value_codes, value_affine, pinned_keys, pinned_values, pinned_stride,
    counts, starts, tail_keys, tail_values, tail_stride_b, tail_stride_h, tail_stride_t, tail_lengths,
    places, pages, page_starts, items, outputs, lses, logit_scale, sequences,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, NA: tl.constexpr, NB: tl.constexpr, NS: tl.constexpr, MANY: tl.constexpr,
    AHEAD: tl.constexpr, BT: tl.constexpr, PAGED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One work item, some tiles of a row's packed zone or some tokens of one of its 16-bit zones, for ``N`` query rows.

    Programs of the same item are neighbours: what one reads the others find in the L2 cache. Packed rows beyond those
    of the ``sequences`` continue them. With ``PAGED`` the packed rows of a sequence are those of its place, and its
    tail is where the pages from its start on say.
    """
    NQ: tl.constexpr = G * Q
    PARTS: tl.constexpr = (NQ + N - 1) // N
    item = tl.program_id(0) // PARTS
    ni = tl.program_id(0) % PARTS * N + tl.arange(0, N)
    row = tl.load(items + item * 4).to(tl.int64)
    zone = tl.load(items + item * 4 + 1)
    begin = tl.load(items + item * 4 + 2)
    end = tl.load(items + item * 4 + 3)
    if PAGED:
        if begin >= end:
            return  # a launch of fixed size has items to spare
    sequence, head = row // H % sequences, row % H
    q_ptr += sequence * q_stride_b + head * G * q_stride_h
    if PAGED:
        row = tl.load(places + sequence).to(tl.int64) * H + head
    if zone == _PACKED:
        many = False
        if MANY:
            many = has_more_columns(counts, row, NA + NB, NS)
        if many:  # a path of its own: the loops over further columns would cost every row registers
            acc, top, total = packed_zone(
                q_ptr, q_stride_h, q_stride_q, key_codes, key_columns, key_affine, value_codes, value_affine,
                counts, starts, row, begin, end, ni, logit_scale, NQ, Q, N, D, DP, W, NA, NB, NS, True, AHEAD, PDL,
            )  # fmt: skip
        else:
            acc, top, total = packed_zone(
                q_ptr, q_stride_h, q_stride_q, key_codes, key_columns, key_affine, value_codes, value_affine,
                counts, starts, row, begin, end, ni, logit_scale, NQ, Q, N, D, DP, W, NA, NB, NS, False, AHEAD, PDL,
            )  # fmt: skip
    elif zone == _PINNED:
        at = tl.load(starts + row * _STARTS + _STARTS - 1) * pinned_stride
        acc, top, total = _raw_zone(
            q_ptr, q_stride_h, q_stride_q, pinned_keys + at, pinned_values + at, pinned_stride, pages,
            begin, end, ni, logit_scale, NQ, Q, N, D, DP, BT, False, PDL,
        )  # fmt: skip
    else:
        at = sequence * tail_stride_b + head * tail_stride_h
        end = tl.minimum(end, tl.load(tail_lengths + sequence))
        if PAGED:
            pages += tl.load(page_starts + sequence)
        acc, top, total = _raw_zone(
            q_ptr, q_stride_h, q_stride_q, tail_keys + at, tail_values + at, tail_stride_t, pages,
            begin, end, ni, logit_scale, NQ, Q, N, D, DP, BT, PAGED, PDL,
        )  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    di = tl.arange(0, DP)
    out = acc / tl.where(total > 0, total, 1.0)[None, :]
    at = (item.to(tl.int64) * NQ + ni)[None, :] * D + di[:, None]
    tl.store(outputs + at, out, mask=(ni < NQ)[None, :] & (di < D)[:, None])
    lse = tl.where(total > 0, top + tl.log2(total), float("-inf"))
    tl.store(lses + item * NQ + ni, lse, mask=ni < NQ)


@triton.jit
def merge_kernel(
    outputs, lses, items, first_item, out, out_lse, out_stride_b, out_stride_h, out_stride_q,
    lse_stride_b, lse_stride_h, lse_stride_q,
    H: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BI: tl.constexpr,
    PDL: tl.constexpr, SPAN: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Merge the items of one row by their log-sum-exp, for one query.

    Values of the packed zone are under a rotation of ``SPAN`` channels, which is undone here, where it costs least.
    """
    row, n = tl.program_id(0), tl.program_id(1)
    NQ: tl.constexpr = G * Q
    begin, end = tl.load(first_item + row), tl.load(first_item + row + 1)
    ii, di = tl.arange(0, BI), tl.arange(0, DP)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc, rotated = tl.zeros([DP], tl.float32), tl.zeros([DP], tl.float32)
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
        if SPAN > 1:
            packed = tl.load(items + (start + ii) * 4 + 1, mask=ok, other=_PINNED) == _PACKED
            rotated = rotated * shrink + tl.sum(part * tl.where(packed, weight, 0.0)[:, None], 0)
            acc = acc * shrink + tl.sum(part * tl.where(packed, 0.0, weight)[:, None], 0)
        else:
            acc = acc * shrink + tl.sum(part * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        top = new
    if SPAN > 1:
        acc += turn(rotated, DP // SPAN, SPAN) * FACTOR
    acc = acc / tl.where(total > 0, total, 1.0)
    sequence, head = row // H, row % H
    q_head, query = head * G + n // Q, n % Q
    at = sequence.to(tl.int64) * out_stride_b + q_head * out_stride_h + query * out_stride_q
    tl.store(out + at + di, acc.to(out.dtype.element_ty), mask=di < D)
    lse = tl.where(total > 0, tl.where(top > float("-inf"), top, 0.0) + tl.log2(total), float("-inf"))
    tl.store(out_lse + sequence * lse_stride_b + q_head * lse_stride_h + query * lse_stride_q, lse)
