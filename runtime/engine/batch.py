"""Sequences that decode together: packed prompts joined layer by layer, and tails in buffers that stay in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.backends import ChosenBackend
from ...kernels.tail import CAPACITY, Tail, attention
from ..cache import CompressedCache
from ..layer import CompressedLayer, Part, join_parts
from .blocks import WINDOW, RecentQueries, compress_oldest


@dataclass
class BatchLayer:
    """One layer of a batch.

    Attributes:
        keys, values: ``[B, H, capacity, D]``, the tails from slot 0 on.
        lengths: ``[B]`` int32, a view of the batch's.
        parts: packed prompts, and packed blocks of the tails; as one wherever the format can join them.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    parts: list[Part]


class Batch:
    """What a decode step reads and writes; it is the same for every step until `reserve` says otherwise.

    Attributes:
        positions: ``[B]`` int64, of each sequence's newest token.
        lengths: ``[layers, B]`` int32, tokens in each tail (which differ by layer where a layer is not compressed).
        steps: taken so far.
        room: steps for which there is room.
    """

    def __init__(self, caches: Sequence[CompressedCache], tail_block: int | None = None) -> None:
        """Sequences of ``caches``, each of one; what is packed is shared, their tails are copied.

        Args:
            caches: the same prompt may occur more than once, as itself or as a fork.
            tail_block: compress so many of the oldest tokens whenever every tail has twice as many.
        """
        self._session, self._block = caches[0].session, tail_block
        # Its own: a captured graph reads the plans that it keeps.
        self.backend = ChosenBackend(self._session.config.backend)
        device = caches[0].compressed_layers[0].device
        seen = [cache.get_seq_length() for cache in caches]
        self.positions = torch.tensor(seen, device=device) - 1
        by_layer = list(zip(*(cache.compressed_layers for cache in caches), strict=True))
        lengths = [[row.get_seq_length() - row.packed_tokens for row in rows] for rows in by_layer]
        # Rows of whole 16 bytes: kernels that know a pointer to be aligned are others, and would be compiled too.
        self.lengths = torch.zeros(len(lengths), -(-len(caches) // 4) * 4, dtype=torch.int32, device=device)
        self.lengths = self.lengths[:, : len(caches)]
        self.lengths.copy_(torch.tensor(lengths))
        self._shortest = min(map(min, lengths))
        self._recent = RecentQueries(device) if tail_block else None
        self.steps, self.room = 0, CAPACITY
        joins = len({cache.session.config.format for cache in caches}) == 1
        self.layers = [
            BatchLayer(*_tails(rows, self.room), self.lengths[i], _parts(rows, joins))
            for i, rows in enumerate(by_layer)
        ]

    def reserve(self) -> bool:
        """Make room for one more step; True if the tails were compressed or exchanged for larger buffers."""
        compressed = self._compress_block()
        self.steps += 1
        if self.steps <= self.room:
            return compressed
        for layer in self.layers:
            layer.keys, layer.values = (_enlarged(t, self.room) for t in (layer.keys, layer.values))
        self.room *= 2
        return True

    def _compress_block(self) -> bool:
        if self._block is None or self._recent is None or self.steps < WINDOW:
            return False
        if self._shortest + self.steps < 2 * self._block:
            return False
        compress_oldest(self.layers, self._recent, self._session.pipeline, self._block)
        self._shortest -= self._block
        self.room += self._block
        return True

    def advance(self) -> None:
        """Let every sequence be one token longer; the token's keys and values are still to be written."""
        self.positions += 1
        self.lengths += 1
        if self._recent is not None:
            self._recent.advance()

    def append(self, index: int, keys: Tensor, values: Tensor) -> None:
        """Write the newest token's keys and values ``[B, H, D]`` of a layer."""
        layer = self.layers[index]
        rows, last = torch.arange(keys.shape[0], device=keys.device), layer.lengths.long() - 1
        layer.keys[rows, :, last] = keys.to(layer.keys.dtype)
        layer.values[rows, :, last] = values.to(layer.values.dtype)

    def attend(self, index: int, query: Tensor, scale: float) -> Tensor:
        """Attention of the newest tokens' ``query`` ``[B, H_q, 1, D]`` in a layer; as ``query``."""
        if self._recent is not None:
            self._recent.write(index, query, scale)
        layer = self.layers[index]
        tail, parts = Tail(layer.keys, layer.values, layer.lengths), layer.parts
        if parts and isinstance(parts[0][0], slice):
            output, lse = parts[0][1].attend_with_tail(query, scale, tail, self.backend)
            parts = parts[1:]
        else:
            output, lse = attention(query, tail, scale)
        if parts:
            output = output.float()
            join_parts(output, lse, parts, query, scale, self.backend)
        return output.to(query.dtype)


def _tails(rows: Sequence[CompressedLayer], room: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the sequences' tails, with ``room`` for more, in the widest of their types."""
    tails = [row.tail for row in rows if row.tail is not None]
    _, heads, _, dim = rows[0].tail_shape
    types = {tail.tokens[0].dtype for tail in tails}
    dtype = max(types, key=lambda kind: torch.finfo(kind).max)
    shape = (len(rows), heads, max(tail.length for tail in tails) + room, dim)
    keys, values = (torch.zeros(shape, dtype=dtype, device=rows[0].device) for _ in range(2))
    for i, tail in enumerate(tails):
        keys[i, :, : tail.length], values[i, :, : tail.length] = (t[0] for t in tail.tokens)
    return keys, values


def _parts(rows: Sequence[CompressedLayer], joins: bool) -> list[Part]:
    """The packed prompts of one layer, as one if the format can; without those that hold nothing."""
    held = [(i, segment) for i, row in enumerate(rows) for _, segment in row.segments if segment.nbytes]
    segments = [segment for _, segment in held]
    whole = segments[0] if len(segments) == 1 else None
    if len(segments) > 1 and joins:
        joined = rows[0].session.format.join(segments, [[i] for i in range(len(segments))])
        whole = None if joined is None else joined[1]
    if whole is not None and len(segments) == len(rows):
        return [(slice(None), whole)]
    device = rows[0].device  # a captured graph takes no list as an index
    if whole is not None:
        return [(torch.tensor([i for i, _ in held], device=device), whole)]
    return [(torch.tensor([i], device=device), segment) for i, segment in held]


def _enlarged(old: Tensor, more: int) -> Tensor:
    batch, heads, capacity, dim = old.shape
    new = old.new_zeros(batch, heads, capacity + more, dim)
    new[:, :, :capacity] = old
    return new
