"""How decode attention is split over the GPU: a list of work items, made once for a packed prompt.

The prompt does not change, so nothing has to be planned in a decode step: a step that only lengthens the tail
runs the same items, of which those beyond the tail's end have nothing to do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .device import processors
from .packed import CODED4, CODED8, CODED16, COLUMNS, NIBBLES, PINNED, TOKENS, Packed

PACKED_ZONE, PINNED_ZONE, TAIL_ZONE = range(3)

OCTET = 8  # slots that stand side by side in words
MOST_NIBBLES, MOST_MORE, MOST_PAIRS = 128, 64, 128  # columns for which there are registers
PINNED_CHUNKS = (128, 512)  # pinned tokens of an item, at least and at most
TAIL_CHUNK = 256  # tail tokens of an item, at least
TAIL_ITEMS = 32  # items of a row's tail, at most
# Work is counted in words that a tile reads of an octet of slots; as many more are what a tile takes whatever it
# reads, and an item whatever its tiles are (folding the query, writing its part, a share of the merge).
TILE_WORK, ITEM_WORK = 250.0, 350.0
MOST_WAVES = 6  # of items, one after the other on the device, that are tried


@dataclass(frozen=True)
class Tile:
    """Compile-time shape of the packed zone's kernel.

    Attributes:
        octets: octets of slots of a tile, a power of two.
        nibbles, more_nibbles, pairs: key columns of 4 and of 2 bits for which a program keeps the folded query, each a
            power of two of at least 16, or 0.
        many: whether some head may have more columns than these; such a head's are folded for every tile.
        warps: warps of a program.
        registers: most registers of a thread, None for no bound.
        resident: programs that a multiprocessor runs at once.
        ahead: whether a program asks for its first values too, beside its first keys, before it has the query.
    """

    octets: int
    nibbles: int
    more_nibbles: int
    pairs: int
    many: bool
    warps: int
    registers: int | None
    resident: int
    ahead: bool = True


def choose_tile(packed: Packed) -> Tile:
    """The shape measured to be the fastest for a prompt's size and its widest head."""
    if packed.dim > 128:
        return Tile(32, *kept_columns(packed), warps=4, registers=168, resident=3)
    # Small tiles where large ones would not give every program one.
    tiles = sum(-(-row[TOKENS] // (64 * OCTET)) for row in packed.host_counts)
    if tiles < 2 * processors(packed.counts.device):
        return Tile(32, *kept_columns(packed, least=16), warps=2, registers=None, resident=4, ahead=False)
    if packed.dim <= 64:
        return Tile(32, *kept_columns(packed), warps=2, registers=168, resident=6, ahead=False)
    return Tile(64, *kept_columns(packed), warps=4, registers=168, resident=3)


def kept_columns(packed: Packed, least: int = 64) -> tuple[int, int, int, bool]:
    """``nibbles``, ``more_nibbles``, ``pairs`` and ``many`` of the tile that suits a prompt's widest heads.

    Of the latter two kinds there are none, or ``least`` and more: where registers are short, fewer make the compiler
    spill them.
    """
    widest = max((row[NIBBLES] for row in packed.host_counts), default=0)
    pairs = max((row[COLUMNS] - 2 * row[NIBBLES] for row in packed.host_counts), default=0)
    first = min(MOST_NIBBLES, _power_of_two(widest, 16))
    more = min(MOST_MORE, _power_of_two(widest - first, least))
    kept = min(MOST_PAIRS, _power_of_two(pairs, least))
    return first, more, kept, widest > first + more or pairs > kept


def _power_of_two(columns: int, least: int) -> int:
    """The least one that is at least ``least`` and ``columns``; 0 for none."""
    return 1 << (max(columns, least) - 1).bit_length() if columns > 0 else 0


@dataclass(frozen=True)
class DecodePlan:
    """Work items of a packed prompt.

    Attributes:
        items: ``[I, 4]`` int32: row, zone, and from where to where: in tiles for the packed zone, in tokens otherwise.
        first_item: ``[B * H + 1]`` int32, where the items start that a head of a sequence merges; they are contiguous.
        most_items: most items of a head.
        tail_capacity: tail tokens that the items cover.
        tile: shape of a tile.
    """

    items: Tensor
    first_item: Tensor
    most_items: int
    tail_capacity: int
    tile: Tile


def make_plan(
    packed: Packed, tail_capacity: int, tile: Tile, pinned: bool = True, sequences: int | None = None
) -> DecodePlan:
    """Items for every zone of ``packed`` and a tail of up to ``tail_capacity`` tokens (0 for none).

    What is packed after the first ``sequences`` (all, if None) continues them: see `decode.attend`.
    Without ``pinned`` the pinned tokens are left out, for a caller that attends to them by other means. Sizes are
    read from the host copy of the prompt's counts.
    """
    counts = torch.tensor(packed.host_counts).reshape(-1, NIBBLES + 1)  # [R, 7] on the host
    device = packed.counts.device
    slots = processors(device) * tile.resident  # programs at a time
    ends = tile_work(counts, tile.octets * OCTET, packed.dim)  # [R, most tiles + 1]
    others = []
    if pinned:
        least, most = PINNED_CHUNKS
        chunk = min(most, max(least, int(counts[:, PINNED].sum()) // slots))
        others.append(_split(counts[:, PINNED], -(-counts[:, PINNED] // chunk), PINNED_ZONE))
    heads = (packed.batch if sequences is None else sequences) * packed.heads
    if tail_capacity:
        tail = torch.full_like(counts[:heads, 0], tail_capacity)
        parts = min(TAIL_ITEMS, -(-tail_capacity // TAIL_CHUNK))
        others.append(_split(tail, torch.full_like(tail, parts), TAIL_ZONE))
    zones = [_cut(ends, work_of_item(ends, slots, sum(map(len, others)))), *others]
    items = torch.cat(zones)
    head = items[:, 0] % max(heads, 1)
    items = items[head.argsort(stable=True)]
    per_head = torch.bincount(head, minlength=heads)
    first = torch.cat([per_head.new_zeros(1), per_head.cumsum(0)])
    most = int(per_head.max()) if len(per_head) else 0
    return DecodePlan(items.int().to(device), first.int().to(device), most, tail_capacity, tile)


def tile_work(counts: Tensor, slots: int, dim: int) -> Tensor:
    """Work of each row's first ``t`` tiles of ``slots`` slots, ``[R, most tiles + 1]``, flat past a row's last."""
    tiles = -(-counts // slots)  # [R, 7], in tiles instead of tokens
    t = torch.arange(int(tiles[:, TOKENS].max()) + 1 if len(counts) else 1)

    def among(column: int) -> Tensor:
        return torch.minimum(t, tiles[:, column, None])

    # Values of 2, 4, 8 and 16 bits are 1, 2, 4 and 8 words a channel.
    values = among(TOKENS) + among(CODED4) + 2 * among(CODED8) + 4 * among(CODED16)
    return (among(TOKENS) * (TILE_WORK + counts[:, COLUMNS, None]) + dim * values).double()


def work_of_item(ends: Tensor, slots: int, others: int = 0) -> float:
    """Work of an item that lets ``slots`` programs at a time finish the rows of `tile_work` ``ends`` soonest.

    Programs run in waves; the last one should be full, and an item costs more than its tiles. ``others`` are
    items of other zones, which take their places too.
    """
    total, tiles = ends[:, -1], ends.diff(dim=1)
    largest = float(tiles.max()) if tiles.numel() else 0.0
    best, soonest = 1.0, float("inf")
    for waves in range(1, MOST_WAVES + 1):
        each = _least_work(total, max(waves * slots - others, slots // 2, 1))
        time = waves * (max(each, largest) + ITEM_WORK)
        if time < soonest:
            best, soonest = each, time
    return best


def _least_work(total: Tensor, items: int) -> float:
    """The least work of an item, nearly, at which rows of ``total`` ``[R]`` make at most so many items."""
    low, high = float(total.sum()) / items, float(total.max()) if len(total) else 0.0
    if int((total > 0).sum()) > items or low >= high:
        return max(low, high, 1.0)
    for _ in range(10):
        middle = (low + high) / 2
        fits = int((total / middle).ceil().sum()) <= items
        low, high = (low, middle) if fits else (middle, high)
    return high


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
