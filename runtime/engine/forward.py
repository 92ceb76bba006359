"""A model's part in generation: reading a prompt into a cache, and one step of a batch. By transformers' own modules.

`decoder` has the same for the models whose layers it knows, in less memory and fewer kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..attention import attach, link
from ..cache import CompressedCache
from .batch import Batch


class Forward(ABC):
    """What the engine asks of a model."""

    @property
    def capturable(self) -> bool:
        """Whether a step may be captured in a graph."""
        return False

    @abstractmethod
    def read(self, ids: Tensor, cache: CompressedCache) -> Tensor:
        """Read ``ids`` ``[1, T]`` into ``cache``, after what it holds; logits ``[V]`` of the last position."""

    @abstractmethod
    def step(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Logits ``[B, V]`` after ``tokens`` ``[B]`` at the batch's positions; keys and values join its tails."""


class PlainForward(Forward):
    """The model's ``forward``, whatever it is made of."""

    def __init__(self, model: Any) -> None:
        self.model = attach(model)

    def read(self, ids: Tensor, cache: CompressedCache) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1]

    def step(self, tokens: Tensor, batch: Batch) -> Tensor:
        logits: Tensor = self.model(
            input_ids=tokens[:, None],
            position_ids=batch.positions[:, None],
            past_key_values=BatchCache(batch),
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]


class BatchCache(Cache):
    """A batch as transformers sees it, for one step."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(layers=[BatchCacheLayer(batch, index) for index in range(len(batch.layers))])


class BatchCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Takes the newest token of every sequence, and attends to all of them (as `CompressedLayer` does for a cache).

    Masks see a cache that holds nothing: each sequence's token attends to the whole of it.
    """

    is_sliding = False

    def __init__(self, batch: Batch, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._batch, self._index = batch, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._batch.append(self._index, key_states[:, :, 0], value_states[:, :, 0])
        return link(key_states, self), value_states

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attention of ``query`` ``[B, H_q, 1, D]``; output ``[B, 1, H_q, D]``."""
        return self._batch.attend(self._index, query, scale).transpose(1, 2)

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1
