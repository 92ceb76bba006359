"""What a scorer sees of one layer: keys, values and queries, with the window's attention on demand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Bound on the float32 attention weights alive at once, in elements (256 MiB): one KV head of a
# 128K prompt with 32 window queries and a group of 4 takes a quarter of it.
CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Observation:
    """One layer's prompt, right after its attention output was computed.

    Attributes:
        keys, values: ``[B, H, T, D]``, keys after the rotary embedding.
        queries: ``[B, H_q, T, D]``, after the rotary embedding; query head ``h * G + g`` reads KV head ``h``.
        scale: factor of the logits, usually ``D ** -0.5``.
        layer: index of the layer.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scale: float
    layer: int

    @property
    def tokens(self) -> int:
        """Prompt length ``T``."""
        return int(self.keys.shape[2])

    @property
    def heads(self) -> int:
        """KV heads ``H``."""
        return int(self.keys.shape[1])

    @property
    def groups(self) -> int:
        """Query heads for each KV head, ``G``."""
        return int(self.queries.shape[1]) // self.heads

    def window_queries(self, window: int) -> Tensor:
        """The last ``W = min(window, T)`` queries, ``[B, H, G, W, D]``."""
        width = min(window, self.tokens)
        tail = self.queries[:, :, self.tokens - width :]
        return tail.reshape(tail.shape[0], self.heads, self.groups, width, -1)

    def attention(self, window: int) -> Tensor:
        """Causal attention of the window over the prompt, ``[B, H, G, W, T]`` float32.

        Holds every head at once; `attention_chunks` is the same within a bound.
        """
        return torch.cat([weights for _, weights in self.attention_chunks(window)], dim=1)

    def attention_chunks(self, window: int) -> Iterator[tuple[slice, Tensor]]:
        """Pairs of a slice of KV heads and their window attention ``[B, h, G, W, T]`` float32."""
        queries = self.window_queries(window)  # [B, H, G, W, D]
        batch, heads, groups, width, _ = queries.shape
        step = max(1, CHUNK_ELEMENTS // (batch * groups * width * self.tokens))
        hidden = self._future_mask(width)  # [W, T]
        for start in range(0, heads, step):
            part = slice(start, min(start + step, heads))
            flat = queries[:, part].flatten(2, 3).float()  # [B, h, G * W, D]
            logits = torch.matmul(flat, self.keys[:, part].float().transpose(-1, -2))
            logits = logits.reshape(batch, -1, groups, width, self.tokens)
            yield part, logits.mul_(self.scale).masked_fill_(hidden, float("-inf")).softmax(-1)

    def visible(self, window: int) -> Tensor:
        """How many of the window's queries see each token, ``[T]`` float32 (the last ones see fewer)."""
        width = min(window, self.tokens)
        return (~self._future_mask(width)).sum(0).float()

    def _future_mask(self, width: int) -> Tensor:
        positions = torch.arange(self.tokens, device=self.keys.device)
        return positions[None, :] > positions[self.tokens - width :, None]  # [W, T]
