"""The observation window: the last queries of a prompt, kept while it is read in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """A part of a prompt that a forward pass reads.

    Attributes:
        owner: the request.
        start, end: positions in the prompt; ``total``: length of the prompt.
    """

    owner: str
    start: int
    end: int
    total: int


@dataclass
class QueryWindows:
    """Queries of the last ``width`` tokens of each prompt that is being read, for every layer.

    Attributes:
        chunks: what the current forward pass reads, in the order of its tokens.
        scales: factor of the logits of each layer.
    """

    width: int
    chunks: Sequence[Chunk] = ()
    scales: dict[int, float] = field(default_factory=dict)
    _kept: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)

    def keep(self, layer: int, queries: Tensor, scale: float) -> None:
        """Keep of a pass's ``queries`` ``[N, H_q, D]`` those that are among the last of their prompt."""
        self.scales[layer], at = scale, 0
        for chunk in self.chunks:
            first = max(chunk.start, chunk.total - self.width)
            if first < chunk.end:
                part = queries[at + first - chunk.start : at + chunk.end - chunk.start]
                self._kept.setdefault(chunk.owner, {}).setdefault(layer, []).append(part.clone())
            at += chunk.end - chunk.start

    def take(self, owner: str, layer: int) -> Tensor:
        """The queries of one layer, ``[1, H_q, W, D]``; they are not kept any longer."""
        parts = self._kept[owner].pop(layer)
        return torch.cat(parts).transpose(0, 1).unsqueeze(0)

    def drop(self, owner: str) -> None:
        """Forget what is kept of a prompt."""
        self._kept.pop(owner, None)

    def __len__(self) -> int:
        return len(self._kept)
