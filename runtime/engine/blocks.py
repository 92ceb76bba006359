"""Tails that are compressed as they grow: their oldest block of tokens becomes one more packed segment.

A block is scored by the newest queries, allocated and packed as a prompt of its length would be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..config import CompressionConfig
from ..errors import ConfigError
from ..interfaces import CacheFormat, PackedSegment
from ..observation import Observation
from ..pipeline import Pending, Pipeline
from ..plan import Scores

if TYPE_CHECKING:
    from .batch import BatchLayer

WINDOW = 64  # newest tokens whose queries observe a block
TAIL_BLOCK = 1024  # tokens of a block unless somebody says otherwise; docs/engine.md has what several sizes cost
TailBlock = int | Literal["auto"] | None


def block_size(asked: TailBlock, compression: CompressionConfig) -> int | None:
    """Tokens of a block, None for no blocks.

    With ``auto`` they are of `TAIL_BLOCK` wherever the budget is a share of the bytes and below all of them: a budget
    that is a number is the prompt's.

    Raises:
        ConfigError: a block of fewer tokens than observe it.
    """
    if asked == "auto":
        return TAIL_BLOCK if (compression.budget or 1.0) < 1.0 else None
    if asked is not None and asked < WINDOW:
        raise ConfigError(f"tail_block is {asked}; it must be at least {WINDOW} tokens, or None")
    return asked


class RecentQueries:
    """The last `WINDOW` queries of every layer, in rings that a captured graph writes to.

    Attributes:
        slot: ``[1]`` int64, on the device, where the newest ones are.
        rings: for each layer ``[B, H_q, WINDOW, D]``.
        scales: factor of the logits of each layer.
    """

    def __init__(self, device: torch.device) -> None:
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.rings: dict[int, Tensor] = {}
        self.scales: dict[int, float] = {}

    def advance(self) -> None:
        """The next slot, for all layers."""
        self.slot.add_(1).remainder_(WINDOW)

    def write(self, index: int, query: Tensor, scale: float) -> None:
        """Keep the newest ``query`` ``[B, H_q, 1, D]`` of a layer."""
        if index not in self.rings:
            batch, heads, _, dim = query.shape
            self.rings[index], self.scales[index] = query.new_zeros(batch, heads, WINDOW, dim), scale
        self.rings[index].index_copy_(2, self.slot, query)

    def ordered(self, index: int) -> Tensor:
        """Queries of a layer from the oldest to the newest, ``[B, H_q, WINDOW, D]``."""
        order = (torch.arange(WINDOW, device=self.slot.device) + self.slot + 1) % WINDOW
        return self.rings[index].index_select(2, order)


def compress_oldest(layers: list[BatchLayer], recent: RecentQueries, pipeline: Pipeline, block: int) -> None:
    """Pack the oldest ``block`` tokens of every tail, which hold at least that many and `WINDOW` more."""
    every = list(range(len(layers)))
    # Layers that share a budget at once, the others one after the other.
    for group in [every] if pipeline.whole_model else [[index] for index in every]:
        pending = [_score(index, layers[index], recent, pipeline, block) for index in group]
        for index, layer, plan in zip(group, pending, pipeline.allocate(pending), strict=True):
            _join(layers[index], pipeline.begin(layer, plan)(), pipeline.format)
            _drop(layers[index], block)


def _score(index: int, layer: BatchLayer, recent: RecentQueries, pipeline: Pipeline, block: int) -> Pending:
    """The block of one layer with its scores; the tokens of the newest queries follow it as those see them."""
    newest = layer.lengths.long()[:, None] + torch.arange(-WINDOW, 0, device=layer.lengths.device)  # [B, W]
    rows = torch.arange(newest.shape[0], device=newest.device)[:, None]
    keys, values = (
        torch.cat([tail[:, :, :block], tail[rows, :, newest].transpose(1, 2)], 2) for tail in (layer.keys, layer.values)
    )
    queries = recent.ordered(index).to(keys.dtype)
    found = pipeline.score(Observation(keys, values, queries, recent.scales[index], index, begins=False))
    pinned = None if found.scores.pinned is None else found.scores.pinned[:, :, :block]
    scores = Scores(found.scores.token[:, :, :block].contiguous(), found.scores.channel, pinned)
    return Pending(found.keys[:, :, :block], found.values[:, :, :block], scores, found.finding, index)


def _join(layer: BatchLayer, packed: PackedSegment, form: CacheFormat) -> None:
    """Put a block of all sequences to what is packed of them, as one segment where the format can make them one."""
    for place, (rows, held) in enumerate(layer.parts):
        if isinstance(rows, slice):
            whole = form.concatenate([held, packed])
            if whole is not None:
                layer.parts[place] = (rows, whole)
                return
    layer.parts.append((slice(None), packed))


def _drop(layer: BatchLayer, block: int) -> None:
    """Take the oldest ``block`` tokens out of a layer's tails, whose buffers stay in place."""
    rest = layer.keys.shape[2] - block
    for tail in (layer.keys, layer.values):
        tail[:, :, :rest] = tail[:, :, block:].clone()
    layer.lengths -= block
