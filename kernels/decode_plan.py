"""How decode attention is split over the GPU: a list of work items, made once for a packed prompt.

The prompt does not change, so nothing has to be planned in a decode step: a step that only lengthens the tail
runs the same items, of which those beyond the tail's end have nothing to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .packed import CODED4, CODED8, CODED16, COLUMNS, PINNED, TOKENS, Packed

PACKED_ZONE, PINNED_ZONE, TAIL_ZONE = range(3)

WORD = 8  # tokens of a 16-bit word
PINNED_CHUNKS = (128, 512)  # pinned tokens of an item, at least and at most
TAIL_CHUNK = 256  # tail tokens of an item, at least
TAIL_ITEMS = 32  # items of a row's tail, at most
# What an item takes beside its tiles (folding the query, writing its part, a share of the merge), in tiles, and
# what each plane of values above the lowest adds to a tile.
OVERHEAD = 0.5
PLANE = 0.4


@dataclass(frozen=True)
class Tile:
    """Compile-time shape of the packed zone's kernel.

    Attributes:
        words: words of a tile, each of 8 slots.
        columns, more_columns: key columns for which a program keeps the folded query, powers of two, the second no
            more than the first.
        many: whether some head has more columns than both; those are folded for every tile.
        warps: warps of a program.
        registers: most registers of a thread, None for no bound.
        resident: programs that a multiprocessor runs at once.
    """

    words: int
    columns: int
    more_columns: int
    many: bool
    warps: int
    registers: int | None
    resident: int


def choose_tile(packed: Packed, queries: int) -> Tile:
    """The shape measured to be the fastest for a prompt's size, its widest head and some query rows a KV head."""
    widest = max((row[COLUMNS] for row in packed.host_counts), default=0)
    columns = min(128, max(16, 1 << (widest.bit_length() - 1) if widest else 16))
    more = min(columns, max(16, 1 << (widest - columns - 1).bit_length() if widest > columns else 16))
    many = widest > columns + more
    if queries > 8:  # twice the sums: fewer tokens a tile, and two programs a multiprocessor
        return Tile(32, columns, more, many, warps=4, registers=None, resident=2)
    # Small tiles where large ones would not give every program one.
    tiles = sum(-(-row[TOKENS] // (64 * WORD)) for row in packed.host_counts)
    small = packed.dim > 128 or tiles < 3 * processors(packed.counts.device)
    return Tile(32 if small else 64, columns, more, many, warps=4, registers=168, resident=3)


@dataclass(frozen=True)
class DecodePlan:
    """Work items of a packed prompt.

    Attributes:
        items: ``[I, 4]`` int32: row, zone, and from where to where: in tiles for the packed zone, in tokens otherwise.
        first_item: ``[R + 1]`` int32, where each row's items start; they are contiguous.
        most_items: most items of a row.
        tail_capacity: tail tokens that the items cover.
        tile: shape of a tile.
    """

    items: Tensor
    first_item: Tensor
    most_items: int
    tail_capacity: int
    tile: Tile


def make_plan(packed: Packed, tail_capacity: int, tile: Tile, pinned: bool = True) -> DecodePlan:
    """Items for every zone of ``packed`` and a tail of up to ``tail_capacity`` tokens (0 for none).

    Without ``pinned`` the pinned tokens are left out, for a caller that attends to them by other means. Sizes are
    read from the host copy of the prompt's counts.
    """
    counts = torch.tensor(packed.host_counts).reshape(-1, COLUMNS + 1)  # [R, 6] on the host
    device = packed.counts.device
    slots = processors(device) * tile.resident  # programs at a time
    ends = tile_weights(counts, tile.words * WORD)  # [R, most tiles + 1]
    zones = [_cut(ends, weight_of_item(ends[:, -1], slots))]
    if pinned:
        least, most = PINNED_CHUNKS
        chunk = min(most, max(least, int(counts[:, PINNED].sum()) // slots))
        zones.append(_split(counts[:, PINNED], -(-counts[:, PINNED] // chunk), PINNED_ZONE))
    if tail_capacity:
        tail = torch.full_like(counts[:, 0], tail_capacity)
        parts = min(TAIL_ITEMS, -(-tail_capacity // TAIL_CHUNK))
        zones.append(_split(tail, torch.full_like(tail, parts), TAIL_ZONE))
    items = torch.cat(zones)
    items = items[items[:, 0].argsort(stable=True)]
    per_row = torch.bincount(items[:, 0], minlength=counts.shape[0])
    first = torch.cat([per_row.new_zeros(1), per_row.cumsum(0)])
    most = int(per_row.max()) if len(per_row) else 0
    return DecodePlan(items.int().to(device), first.int().to(device), most, tail_capacity, tile)


def tile_weights(counts: Tensor, slots: int) -> Tensor:
    """Work of each row's first ``t`` tiles of ``slots`` slots, ``[R, most tiles + 1]``, flat past a row's last."""
    tiles = -(-counts // slots)  # [R, 6], in tiles instead of tokens
    t = torch.arange(int(tiles[:, TOKENS].max()) + 1 if len(counts) else 1)

    def among(column: int) -> Tensor:
        return torch.minimum(t, tiles[:, column, None])

    return among(TOKENS) + PLANE * (among(CODED4) + 2 * among(CODED8) + 4 * among(CODED16))


def weight_of_item(weights: Tensor, slots: int) -> float:
    """Work of an item that lets ``slots`` programs at a time finish the rows' ``weights`` ``[R]`` soonest.

    Programs run in waves; the last one should be full, and an item costs more than its tiles.
    """
    best, soonest = 1.0, float("inf")
    for each in range(1, int(weights.max()) + 2 if len(weights) else 2):
        waves = -(-int((weights / each).ceil().sum()) // slots)
        if waves * (each + OVERHEAD) < soonest:
            best, soonest = float(each), waves * (each + OVERHEAD)
    return best


def _cut(ends: Tensor, each: float) -> Tensor:
    """Items of the packed zone of about ``each`` work, ``[I, 4]``; a tile is never cut."""
    total = ends[:, -1]
    parts = (total / each).ceil().long()
    row = torch.arange(ends.shape[0]).repeat_interleave(parts)
    part = torch.arange(row.shape[0]) - (parts.cumsum(0) - parts)[row]
    share = (total / parts.clamp(min=1))[row]
    bounds = torch.stack([part * share, (part + 1) * share], 1) - 1e-3  # [I, 2]
    tiles = torch.searchsorted(ends[row].contiguous(), bounds)
    items = torch.stack([row, torch.full_like(row, PACKED_ZONE), tiles[:, 0], tiles[:, 1]], 1)
    return items[tiles[:, 1] > tiles[:, 0]]


def _split(size: Tensor, parts: Tensor, zone: int) -> Tensor:
    """Items that cut ``size`` ``[R]`` of each row into ``parts`` ``[R]`` nearly equal ones, ``[sum parts, 4]``."""
    row = torch.arange(size.shape[0]).repeat_interleave(parts)
    part = torch.arange(row.shape[0]) - (parts.cumsum(0) - parts)[row]
    size, parts = size[row], parts[row]
    return torch.stack([row, torch.full_like(row, zone), part * size // parts, (part + 1) * size // parts], 1)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; a handful where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
