"""How decode attention is split over the GPU: a list of work items, made once for a packed prompt.

The prompt does not change, so nothing has to be planned in a decode step: a step that only lengthens the tail
runs the same items, of which those beyond the tail's end have nothing to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .packed import COLUMNS, PINNED, TOKENS, Packed

PACKED_ZONE, PINNED_ZONE, TAIL_ZONE = range(3)

WORD = 8  # tokens of a 16-bit word
PINNED_CHUNK = 512  # pinned tokens of an item
TAIL_CHUNK = 256  # tail tokens of an item, at least
TAIL_ITEMS = 32  # items of a row's tail, at most
# What an item takes beside its tiles (folding the query, writing its part, a share of the merge), in tiles.
OVERHEAD = 0.5


@dataclass(frozen=True)
class Tile:
    """Compile-time shape of the packed zone's kernel.

    Attributes:
        words: words of a tile, each of 8 slots.
        columns, more_columns: key columns for which a program keeps the folded query, powers of two, the second no
            more than the first; columns beyond both are folded for every tile.
        warps: warps of a program.
        registers: most registers of a thread, None for no bound.
        resident: programs that a multiprocessor runs at once.
    """

    words: int
    columns: int
    more_columns: int
    warps: int
    registers: int | None
    resident: int


def choose_tile(packed: Packed, queries: int) -> Tile:
    """The shape measured to be the fastest for a prompt's widest head and some query rows a KV head."""
    widest = max((row[COLUMNS] for row in packed.host_counts), default=0)
    columns = min(128, max(16, 1 << (widest.bit_length() - 1) if widest else 16))
    rest = max(16, widest - columns)
    more = min(columns, 1 << (rest - 1).bit_length())
    if queries > 8:  # twice the sums: fewer tokens a tile, and two programs a multiprocessor
        return Tile(32, columns, more, warps=4, registers=None, resident=2)
    return Tile(64 if packed.dim <= 128 else 32, columns, more, warps=4, registers=168, resident=3)


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
    tiles = -(-counts[:, TOKENS] // (tile.words * WORD))
    each = tiles_of_item(tiles, processors(device) * tile.resident)
    zones = [_split(tiles, -(-tiles // each), PACKED_ZONE)]
    if pinned:
        zones.append(_split(counts[:, PINNED], -(-counts[:, PINNED] // PINNED_CHUNK), PINNED_ZONE))
    if tail_capacity:
        tail = torch.full_like(tiles, tail_capacity)
        parts = min(TAIL_ITEMS, -(-tail_capacity // TAIL_CHUNK))
        zones.append(_split(tail, torch.full_like(tiles, parts), TAIL_ZONE))
    items = torch.cat(zones)
    items = items[items[:, 0].argsort(stable=True)]
    per_row = torch.bincount(items[:, 0], minlength=counts.shape[0])
    first = torch.cat([per_row.new_zeros(1), per_row.cumsum(0)])
    most = int(per_row.max()) if len(per_row) else 0
    return DecodePlan(items.int().to(device), first.int().to(device), most, tail_capacity, tile)


def tiles_of_item(tiles: Tensor, slots: int) -> int:
    """Tiles of an item that let ``slots`` programs at a time finish the rows' ``tiles`` ``[R]`` soonest.

    Programs run in waves; the last one should be full, and an item costs more than its tiles.
    """
    best, soonest = 1, float("inf")
    for each in range(1, max(1, int(tiles.max())) + 1 if len(tiles) else 2):
        waves = -(-int((-(-tiles // each)).sum()) // slots)
        if waves * (each + OVERHEAD) < soonest:
            best, soonest = each, waves * (each + OVERHEAD)
    return best


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
