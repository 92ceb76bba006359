"""How decode attention is split over the GPU: a list of work items, made once for a packed prompt.

The prompt does not change, so nothing has to be planned in a decode step: a step that only lengthens the tail
runs the same items, of which those beyond the tail's end have nothing to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .packed import PINNED, TOKENS, Packed

PACKED_ZONE, PINNED_ZONE, TAIL_ZONE = range(3)

WORD = 8  # tokens of a 16-bit word
PINNED_CHUNK = 512  # pinned tokens of an item
TAIL_CHUNK = 256  # tail tokens of an item, at least
TAIL_ITEMS = 32  # items of a row's tail, at most


@dataclass(frozen=True)
class Tile:
    """Compile-time shape of the packed zone's kernel.

    Attributes:
        words: words of a tile, each of 8 slots.
        columns: key columns of a step.
        warps: warps of a program.
        stages: loads in flight ahead of their use.
        registers: most registers of a thread, None for no bound.
    """

    words: int
    columns: int
    warps: int
    stages: int = 1
    registers: int | None = None


@dataclass(frozen=True)
class DecodePlan:
    """Work items of a packed prompt.

    Attributes:
        items: ``[I, 4]`` int32: row, zone, and from where to where: in tiles for the packed zone, in tokens otherwise.
        first_item: ``[R + 1]`` int32, where each row's items start; they are contiguous.
        tail_capacity: tail tokens that the items cover.
        tile: shape of a tile.
    """

    items: Tensor
    first_item: Tensor
    tail_capacity: int
    tile: Tile


def make_plan(packed: Packed, tail_capacity: int, tile: Tile, programs: int) -> DecodePlan:
    """Items for every zone of ``packed`` and a tail of up to ``tail_capacity`` tokens.

    Args:
        packed: the prompt; its sizes are read from the host copy of the counts.
        tail_capacity: 0 for no tail.
        tile: shape of a tile.
        programs: items to aim at in all, so that the device is full several times over.
    """
    counts = torch.tensor(packed.host_counts)  # [R, 6] on the host
    tiles = -(-counts[:, TOKENS] // (tile.words * WORD))
    each = max(1, int(tiles.sum()) // max(1, programs))
    zones = [
        _split(tiles, -(-tiles // each), PACKED_ZONE),
        _split(counts[:, PINNED], -(-counts[:, PINNED] // PINNED_CHUNK), PINNED_ZONE),
    ]
    if tail_capacity:
        chunks = min(TAIL_ITEMS, -(-tail_capacity // TAIL_CHUNK))
        tail = torch.full_like(tiles, tail_capacity)
        zones.append(_split(tail, torch.full_like(tiles, chunks), TAIL_ZONE))
    items = torch.cat(zones)
    items = items[items[:, 0].argsort(stable=True)]
    per_row = torch.bincount(items[:, 0], minlength=counts.shape[0])
    first = torch.cat([per_row.new_zeros(1), per_row.cumsum(0)])
    device = packed.counts.device
    return DecodePlan(items.int().to(device), first.int().to(device), tail_capacity, tile)


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
