"""Kernels of `decode_schedule`: how a batch's work is cut into items, on the device, for all layers at once."""

from __future__ import annotations

import triton
import triton.language as tl

from .decode_plan import ITEM_WORK, MOST_WAVES, PACKED_ZONE, PINNED_ZONE, TAIL_ZONE, TILE_WORK
from .packed import CODED4, CODED8, CODED16, COLUMNS, PINNED, TOKENS, VALUE_EXPONENT

_N, _N4, _N8, _N16 = (tl.constexpr(i) for i in (TOKENS, CODED4, CODED8, CODED16))
_PINS, _C, _COUNTS = tl.constexpr(PINNED), tl.constexpr(COLUMNS), tl.constexpr(VALUE_EXPONENT + 1)
_PACKED, _PINNED, _TAIL = tl.constexpr(PACKED_ZONE), tl.constexpr(PINNED_ZONE), tl.constexpr(TAIL_ZONE)
_TILE_WORK, _ITEM_WORK, _WAVES = tl.constexpr(TILE_WORK), tl.constexpr(ITEM_WORK), tl.constexpr(MOST_WAVES)
LEAST_CHUNK = tl.constexpr(128)  # 16-bit tokens of an item, at least


@triton.jit
def count_kernel(
    counts, prompt_tokens, places, lengths, parts, first_item, tail_lengths, page_starts,
    rows, slots, layer_stride, page_stride,
    H: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Items of every row of a layer, ``parts [layers, rows, 3]`` by zone, and where they start; tails, once.

    ``slots`` programs run at a time, in waves. Of the 16-bit zones there are about ``slots`` items each, and of the
    packed zone as many as end soonest, of at most `MOST_WAVES` waves; there is at most one more for every row and zone.
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
    pinned_parts = tl.cdiv(pinned, tl.maximum(tl.cdiv(tl.sum(pinned, 0), slots), LEAST_CHUNK))
    held = tl.load(prompt_tokens + place, mask=ok, other=0)
    tail = tl.where(ok, tl.load(lengths + sequence, mask=ok, other=0).to(tl.int32) - held, 0)
    tail_parts = tl.cdiv(tail, tl.maximum(tl.cdiv(tl.sum(tail, 0), slots), LEAST_CHUNK))
    others = tl.sum(pinned_parts + tail_parts, 0)
    largest = tl.max(tl.where(tiles > 0, work / tl.maximum(tiles, 1), 0.0), 0)  # a tile is never cut
    each, soonest = largest, float("inf")
    for wave in tl.static_range(1, _WAVES + 1):
        # Rows are cut into whole items: on average half an item more than their share.
        tried = tl.maximum(tl.sum(work, 0) / tl.maximum(wave * slots - others - rows // 2, slots // 2), largest)
        count = tl.sum(tl.ceil(work / tl.maximum(tried, 1.0)), 0) + others
        time = tl.ceil(count / slots) * (tried + _ITEM_WORK)
        each = tl.where(time < soonest, tried, each)
        soonest = tl.minimum(time, soonest)
    packed_parts = tl.minimum(tl.ceil(work / tl.maximum(each, 1.0)).to(tl.int32), tiles)
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
