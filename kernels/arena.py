"""A store of fixed addresses and capacity for packed prompts that come and go, all layers of a model.

Every prompt has a *place*, a row block of the tables (counts, starts, affine parameters of the keys), and a *region*,
a span of bytes of which each layer has its share (`ArenaShape.part`). A captured graph reads tables and stores where
they are; which places a batch reads is data.
"""

from __future__ import annotations

import torch

from .arena_shape import ALIGNMENT, ArenaShape
from .packed import (
    COLUMN_START,
    KEY_START,
    PINNED_START,
    TOKENS,
    VALUE_AFFINE_START,
    VALUE_EXPONENT,
    VALUE_START,
    HostCounts,
    Packed,
)


class Arena:
    """Stores and tables of all layers; places that hold no prompt have counts of 0.

    Attributes:
        prompt_tokens: ``[places]`` int32, tokens of the prompt that a place holds packed.
        counts: ``[layers, places * H, 9]`` int32, as `Packed.counts`; ``starts`` ``[layers, places * H, 5]`` int64.
    """

    def __init__(self, shape: ArenaShape, device: torch.device) -> None:
        self.shape, rows = shape, shape.places * shape.heads
        self._store = torch.empty(sum(shape.store_bytes), dtype=torch.uint8, device=device)
        self._stores = torch.split(self._store, list(shape.store_bytes))
        self._key_affine = torch.zeros(shape.layers, rows, shape.dim, 2, dtype=torch.float16, device=device)
        self.counts = torch.zeros(shape.layers, rows, VALUE_EXPONENT + 1, dtype=torch.int32, device=device)
        self.starts = torch.zeros(shape.layers, rows, PINNED_START + 1, dtype=torch.int64, device=device)
        self.prompt_tokens = torch.zeros(shape.places, dtype=torch.int32, device=device)
        self.layers = [self._table(layer) for layer in range(shape.layers)]

    def _table(self, layer: int) -> Packed:
        """All places of a layer as one `Packed`; what is in which row only the device knows."""
        store, dim, span = self._stores[layer], self.shape.dim, self.shape.span
        pinned = store.view(self.shape.dtype).view(-1, 2, dim)
        return Packed(
            batch=self.shape.places,
            heads=self.shape.heads,
            dim=dim,
            span=span,
            host_counts=(),
            raw=(),
            key_codes=store.view(torch.int16),
            key_columns=store.view(torch.int16),
            key_affine=self._key_affine[layer],
            value_codes=store.view(torch.int16),
            value_affine=store.view(torch.float16).view(-1, 2),
            pinned_keys=pinned[:, 0],
            pinned_values=pinned[:, 1],
            counts=self.counts[layer],
            starts=self.starts[layer],
        )

    def rows(self, place: int) -> slice:
        """Rows of a place in the tables of a layer."""
        return slice(place * self.shape.heads, (place + 1) * self.shape.heads)

    def write(self, layer: int, place: int, region: slice, packed: Packed) -> int:
        """Copy a prompt's layer into its region; the device is not waited for.

        Args:
            region: bytes of the arena, see `ArenaShape.part`.
            packed: of one sequence.

        Returns:
            Bytes used of the layer's part of the region.

        Raises:
            ValueError: the prompt does not fit in that part, or its values are rotated otherwise.
        """
        if packed.span != self.shape.span and any(row[TOKENS] for row in packed.host_counts):
            raise ValueError(
                f"values are rotated over {packed.span} channels, those of the arena over {self.shape.span}"
            )
        room = self.shape.part(layer, region)
        end, dim, table = room.start, self.shape.dim, self.layers[layer]
        store, starts = self._stores[layer], [0] * (PINNED_START + 1)
        pinned = torch.stack([packed.pinned_keys, packed.pinned_values], 1)  # [p, 2, D]
        parts = (
            (PINNED_START, pinned, self.shape.pinned_bytes),
            (KEY_START, packed.key_codes, 2),
            (VALUE_START, packed.value_codes, 2),
            (VALUE_AFFINE_START, packed.value_affine, 4),
            (COLUMN_START, packed.key_columns, 2),
        )
        for column, part, size in parts:
            begin = -(-end // ALIGNMENT) * ALIGNMENT if column != PINNED_START else end
            end = begin + int(part.nbytes)
            if end > room.stop:
                raise ValueError(f"layer {layer}: a packed prompt exceeds its {room.stop - room.start} bytes")
            store[begin:end] = part.reshape(-1).view(torch.uint8)
            starts[column] = begin // size
        rows = self.rows(place)
        table.key_affine[rows] = packed.key_affine.view(-1, dim, 2)
        table.counts[rows] = packed.counts
        base = torch.tensor(starts, pin_memory=store.is_cuda)  # or the copy would wait for the device
        table.starts[rows] = packed.starts + base.to(store.device, non_blocking=True)
        return int(end - room.start)

    def clear(self, place: int) -> None:
        """Let a place hold nothing."""
        rows = self.rows(place)
        self.counts[:, rows] = 0
        self.prompt_tokens[place] = 0

    def view(self, layer: int, places: list[int], host_counts: HostCounts) -> Packed:
        """Some places of a layer as a batch, in that order, for code that asks the host for sizes."""
        table, heads = self.layers[layer], self.shape.heads
        rows = torch.tensor([p * heads + h for p in places for h in range(heads)], device=table.counts.device)
        return Packed(
            batch=len(places),
            heads=heads,
            dim=table.dim,
            span=table.span,
            host_counts=host_counts,
            raw=(0,) * len(host_counts),
            key_codes=table.key_codes,
            key_columns=table.key_columns,
            key_affine=table.key_affine[rows],
            value_codes=table.value_codes,
            value_affine=table.value_affine,
            pinned_keys=table.pinned_keys,
            pinned_values=table.pinned_values,
            counts=table.counts[rows],
            starts=table.starts[rows],
        )
