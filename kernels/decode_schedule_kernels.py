"""Kernels of `decode_schedule`: how a batch's work is cut into items, on the device, for all layers at once."""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_plan import ITEM_WORK, MOST_WAVES, OCTET, PACKED_ZONE, PINNED_ZONE, TAIL_ZONE, TILE_WORK
from .packed import CODED4, CODED8, CODED16, COLUMNS, PINNED, TOKENS, VALUE_EXPONENT

_N, _N4, _N8, _N16 = (tl.constexpr(i) for i in (TOKENS, CODED4, CODED8, CODED16))
_PINS, _C, _COUNTS = tl.constexpr(PINNED), tl.constexpr(COLUMNS), tl.constexpr(VALUE_EXPONENT + 1)
_PACKED, _PINNED, _TAIL = tl.constexpr(PACKED_ZONE), tl.constexpr(PINNED_ZONE), tl.constexpr(TAIL_ZONE)
_TILE_WORK, _ITEM_WORK, _WAVES = tl.constexpr(TILE_WORK), tl.constexpr(ITEM_WORK), tl.constexpr(MOST_WAVES)
_OCTET = tl.constexpr(OCTET)
LEAST_CHUNK = tl.constexpr(128)  # 16-bit tokens of an item, at least


@triton.jit
def count_kernel(
    counts, prompt_tokens, places, lengths, parts, first_item, tail_lengths, page_starts,
    rows, slots, layer_stride, page_stride,
    H: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Items of every row of a layer, ``parts [layers, rows, 3]`` by zone, and where they start; tails, once.

    ``slots`` programs run at a time, in waves. Every zone is cut into items of about as much work as lets them end
    soonest, in at most `MOST_WAVES` waves; there is at most one more for every row and zone.
    """
    layer = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BR)
    ok = r < rows
    sequence = r // H
    place = tl.load(places + sequence, mask=ok, other=0).to(tl.int64)
    row = counts + layer * layer_stride + (place * H + r % H) * _COUNTS
    n, pinned = tl.load(row + _N, mask=ok, other=0), tl.load(row + _PINS, mask=ok, other=0)
    columns = tl.load(row + _C, mask=ok, other=0)
    tiles = tl.cdiv(n, TILE)
    # Values of 2, 4, 8 and 16 bits are 1, 2, 4 and 8 words a channel.
    words = tiles + tl.cdiv(tl.load(row + _N4, mask=ok, other=0), TILE)
    words += 2 * tl.cdiv(tl.load(row + _N8, mask=ok, other=0), TILE)
    words += 4 * tl.cdiv(tl.load(row + _N16, mask=ok, other=0), TILE)
    work = tiles.to(tl.float32) * (_TILE_WORK + columns) + D * words.to(tl.float32)
    held = tl.load(prompt_tokens + place, mask=ok, other=0)
    tail = tl.where(ok, tl.load(lengths + sequence, mask=ok, other=0).to(tl.int32) - held, 0)
    TOKEN_WORK: tl.constexpr = 2.0 * D * _OCTET / TILE  # as many bytes are as much work
    pinned_work, tail_work = pinned * TOKEN_WORK, tail * TOKEN_WORK
    total = tl.sum(work + pinned_work + tail_work, 0)
    # A row's zone is cut into whole items: on average half an item more than its share.
    halves = tl.sum((tiles > 0).to(tl.int32) + (pinned > 0) + (tail > 0), 0) // 2
    largest = tl.max(tl.where(tiles > 0, work / tl.maximum(tiles, 1), 0.0), 0)  # a tile is never cut
    each, soonest = largest, float("inf")
    for wave in tl.static_range(1, _WAVES + 1):
        tried = tl.maximum(total / tl.maximum(wave * slots - halves, slots // 2), tl.maximum(largest, 1.0))
        count = tl.sum(tl.ceil(work / tried) + tl.ceil(pinned_work / tried) + tl.ceil(tail_work / tried), 0)
        time = tl.ceil(count / slots) * (tried + _ITEM_WORK)
        each = tl.where(time < soonest, tried, each)
        soonest = tl.minimum(time, soonest)
    packed_parts = tl.minimum(tl.ceil(work / each).to(tl.int32), tiles)
    pinned_parts = tl.minimum(tl.ceil(pinned_work / each).to(tl.int32), tl.cdiv(pinned, LEAST_CHUNK))
    tail_parts = tl.minimum(tl.ceil(tail_work / each).to(tl.int32), tl.cdiv(tail, LEAST_CHUNK))
    at = parts + (layer * rows + r) * 3
    tl.store(at + _PACKED, packed_parts, mask=ok)
    tl.store(at + _PINNED, pinned_parts, mask=ok)
    tl.store(at + _TAIL, tail_parts, mask=ok)
    ends = tl.cumsum(packed_parts + pinned_parts + tail_parts, 0)
    first_item += layer * (rows + 1)
    tl.store(first_item + r, tl.zeros([BR], tl.int32), mask=r < 1)
    tl.store(first_item + 1 + r, ends, mask=ok)
    once = (r < tl.where(layer == 0, rows, 0)) & (r % H == 0)
    tl.store(tail_lengths + sequence, tail, mask=once)
    tl.store(page_starts + sequence, place * page_stride + held, mask=once)


@triton.jit
def _cut(items, row, size, parts, ZONE: tl.constexpr, BI: tl.constexpr):
    """Items that cut ``size`` into ``parts`` nearly equal ones; where the next ones go."""
    for first in range(0, parts, BI):
        i = first + tl.arange(0, BI)
        inside = i < parts
        at = items + i * 4
        tl.store(at, tl.zeros([BI], tl.int32) + row, mask=inside)
        tl.store(at + 1, tl.zeros([BI], tl.int32) + ZONE, mask=inside)
        tl.store(at + 2, (i.to(tl.int64) * size // parts).to(tl.int32), mask=inside)
        tl.store(at + 3, ((i + 1).to(tl.int64) * size // parts).to(tl.int32), mask=inside)
    return items + parts * 4


@triton.jit
def cut_kernel(
    counts, places, parts, first_item, tail_lengths, items, rows, capacity, layer_stride,
    H: tl.constexpr, TILE: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Items of a row of a layer into ``items [layers, capacity, 4]``; those left over have nothing to do."""
    layer, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first_item += layer * (rows + 1)
    items += layer * capacity * 4
    begin = tl.load(first_item + row)
    items += begin * 4
    if row == rows:
        _cut(items, 0, 0, capacity - begin, _TAIL, BI)
    else:
        at = parts + (layer * rows + row) * 3
        place = tl.load(places + row // H).to(tl.int64)
        held = counts + layer * layer_stride + (place * H + row % H) * _COUNTS
        items = _cut(items, row, tl.cdiv(tl.load(held + _N), TILE), tl.load(at + _PACKED), _PACKED, BI)
        items = _cut(items, row, tl.load(held + _PINS), tl.load(at + _PINNED), _PINNED, BI)
        _cut(items, row, tl.load(tail_lengths + row // H), tl.load(at + _TAIL), _TAIL, BI)
