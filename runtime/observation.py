"""What a scorer sees of one layer: keys, values and queries, with the window's attention on demand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..kernels import naive_window
from ..kernels.available import kernels_for, triton_takes
from ..kernels.naive_window import Moment


@dataclass(frozen=True)
class Observation:
    """One layer's prompt, right after its attention output was computed (or a block of what was written after one).

    Attributes:
        keys, values: ``[B, H, T, D]``, keys after the rotary embedding.
        queries: ``[B, H_q, T, D]``, after the rotary embedding; query head ``h * G + g`` reads KV head ``h``. Those of
            the last tokens alone, if what is compressed was written rather than read.
        scale: factor of the logits, usually ``D ** -0.5``.
        layer: index of the layer.
        begins: whether the first token is the sequence's first, where attention sinks are.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scale: float
    layer: int
    begins: bool = True

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

    def sinks(self, count: int) -> int:
        """How many of the first ``count`` tokens are attention sinks: none in a block of what came later."""
        return min(count, self.tokens) if self.begins else 0

    def window_queries(self, window: int) -> Tensor:
        """The last ``W = min(window, T)`` queries, ``[B, H, G, W, D]``; fewer if there are not as many."""
        held = self.queries.shape[2]
        width = min(window, held)
        tail = self.queries[:, :, held - width :]
        return tail.reshape(tail.shape[0], self.heads, self.groups, width, -1)

    def attention_moment(self, window: int, moment: Moment) -> Tensor:
        """``max a``, ``sum a`` or ``sum a^2`` of each token over the window's queries and the KV head's group.

        Of the attention itself nothing is held on a GPU, and a chunk at a time elsewhere.

        Returns:
            ``[B, H, T]`` float32.
        """
        queries = self.window_queries(window)
        token: Tensor = self._kernels().token_moments(queries, self.keys, self.scale, moment)
        return token

    def key_statistics(self, start: int = 0) -> tuple[Tensor, Tensor]:
        """Mean and variance of each key channel over the tokens from ``start`` on, both ``[B, H, D]`` float32."""
        mean, variance = self._kernels().key_statistics(self.keys[:, :, start:])
        return mean, variance

    def value_leverage(self) -> Tensor:
        """How unlike the others of its head each value is, ``[B, H, T]`` float32; see `kernels.naive_leverage`."""
        found: Tensor = kernels_for("leverage", self.values).leverage(self.values)
        return found

    def attention(self, window: int) -> Tensor:
        """Causal attention of the window over the prompt, ``[B, H, G, W, T]`` float32.

        Holds every head at once; `attention_chunks` is the same within a bound.
        """
        return torch.cat([weights for _, weights in self.attention_chunks(window)], dim=1)

    def attention_chunks(self, window: int) -> Iterator[tuple[slice, Tensor]]:
        """Pairs of a slice of KV heads and their window attention ``[B, h, G, W, T]`` float32.

        A chunk has 256 MiB of weights at most, or is one KV head. Where a moment is enough,
        `attention_moment` is faster.
        """
        return naive_window.attention_chunks(self.window_queries(window), self.keys, self.scale)

    def visible(self, window: int) -> Tensor:
        """How many of the window's queries see each token, ``[T]`` float32 (the last ones see fewer)."""
        after = torch.arange(self.tokens, 0, -1, dtype=torch.float32, device=self.keys.device)
        return after.clamp(max=min(window, self.queries.shape[2]))

    def _kernels(self) -> ModuleType:
        """`kernels.window` where it can run, else its twin in plain PyTorch."""
        if triton_takes(self.keys):
            from ..kernels import window  # not above: it needs Triton

            if self.keys.dtype == self.queries.dtype in window.DTYPES:
                return window
        return naive_window
