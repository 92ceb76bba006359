"""Work items of a batch whose prompts come and go: made on the device, in two launches for all layers.

Everything has fixed addresses and sizes, so that a captured graph may make them anew in every step. `decode_plan`
makes better ones, on the host, for prompts that stay together.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor

from .arena import Arena
from .decode_plan import MOST_MORE, MOST_NIBBLES, MOST_WAVES, OCTET, DecodePlan, Tile
from .decode_schedule_kernels import count_kernel, cut_kernel
from .device import processors
from .tail import PagedTail

MERGED = 16  # items that a merge reads at once
PAIRS = 64  # key columns of 2 bits that most heads have at most


def arena_tile(dim: int) -> Tile:
    """The shape of a tile that takes any prompt; it suits heads with up to so many columns best."""
    octets = 32 if dim > 128 else 64
    return Tile(octets, MOST_NIBBLES, MOST_MORE, PAIRS, True, warps=4, registers=168, resident=3)


class Schedule:
    """Items of ``batch`` sequences with prompts in an arena.

    Attributes:
        plans: of every layer, for `decode.attend`.
        tail_lengths: ``[B]`` int32, tokens after each prompt; ``page_starts`` ``[B]`` int64, where they start in the
            pages.
    """

    def __init__(self, arena: Arena, batch: int, tile: Tile | None = None) -> None:
        shape, device = arena.shape, arena.counts.device
        self._arena, self._tile, self._rows = arena, tile or arena_tile(shape.dim), batch * shape.heads
        self._slots = processors(device) * self._tile.resident
        capacity = MOST_WAVES * self._slots + 3 * self._rows + 8  # see `count_kernel`; float32 rounds
        new = partial(torch.zeros, dtype=torch.int32, device=device)
        self._items, self._first = new(shape.layers, capacity, 4), new(shape.layers, self._rows + 1)
        self._parts = new(shape.layers, self._rows, 3)
        self.tail_lengths, self.page_starts = new(batch), new(batch, dtype=torch.int64)
        self.plans = [
            DecodePlan(items, first, MERGED, 0, self._tile)
            for items, first in zip(self._items, self._first, strict=True)
        ]

    def update(self, places: Tensor, lengths: Tensor, page_stride: int) -> None:
        """Make the items of a step.

        Args:
            places: ``[B]``, of each sequence's prompt in the arena.
            lengths: ``[B]``, tokens of each sequence, those of its prompt included.
            page_stride: pages of a place, from a place's first token on.
        """
        shape, counts = self._arena.shape, self._arena.counts
        sizes = {"H": shape.heads, "TILE": self._tile.octets * OCTET}
        with torch.cuda.device_of(counts):  # type: ignore[no-untyped-call]
            count_kernel[(shape.layers,)](
                counts, self._arena.prompt_tokens, places, lengths,
                self._parts, self._first, self.tail_lengths, self.page_starts,
                self._rows, self._slots, counts.stride(0), page_stride,
                **sizes, D=shape.dim, BR=triton.next_power_of_2(self._rows), num_warps=4,
            )  # fmt: skip
            cut_kernel[(shape.layers, self._rows + 1)](
                counts, places, self._parts, self._first, self.tail_lengths, self._items,
                self._rows, self._items.shape[1], counts.stride(0), **sizes, BI=64, num_warps=1,
            )  # fmt: skip

    def tail(self, keys: Tensor, values: Tensor, pages: Tensor, places: Tensor) -> PagedTail:
        """The tokens after the prompts, of pools ``[N, H, D]``."""
        return PagedTail(keys, values, pages, self.page_starts, self.tail_lengths, places)
