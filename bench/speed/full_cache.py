"""A batch with a full 16-bit cache, for the engine's own decode step: attention by FlashInfer, or by PyTorch's sdpa."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PAGE = 16  # tokens of a page
WORKSPACE = 256 << 20  # bytes
ROOM = 256  # tokens that may be written after the prompts
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query [B, H_q, D], keys and values [B, T, H, D]


@dataclass
class FullLayer:
    """Keys and values ``[B, H, T, D]``, views of ``[B, T, H, D]`` in memory; what a step writes and reads."""

    keys: Tensor
    values: Tensor
    lengths: Tensor


class FullBatch:
    """Stands for `rdkv.runtime.engine.batch.Batch`, with random keys and values in place of packed prompts.

    Steps attend to the prompts' tokens: the few that are generated while it is timed are written, not read.
    """

    def __init__(self, config: Any, batch: int, tokens: int, device: str, dtype: torch.dtype) -> None:
        heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        self.tokens, self._capacity = tokens, math.ceil((tokens + ROOM) / PAGE) * PAGE
        self.positions = torch.full((batch,), tokens - 1, device=device)
        self._lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        shape = (batch, self._capacity, heads, dim)

        def random() -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_().transpose(1, 2)

        self.layers = [FullLayer(random(), random(), self._lengths) for _ in range(config.num_hidden_layers)]
        self.attends_by, self._attend = self._library(config.num_attention_heads, heads, dim, dtype)

    def reserve(self) -> bool:
        return False

    def advance(self) -> None:
        self.positions += 1
        self._lengths += 1

    def attend(self, index: int, query: Tensor, scale: float) -> Tensor:
        layer = self.layers[index]
        output = self._attend(query.squeeze(2), layer.keys.transpose(1, 2), layer.values.transpose(1, 2))
        return output.view_as(query)

    def _library(self, q_heads: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[str, Attend]:
        """FlashInfer's paged decode, planned once, where it is installed."""
        batch, device = self.positions.shape[0], self.positions.device
        try:
            import flashinfer
        except ImportError:
            return "sdpa", self._by_sdpa
        pages, each = self._capacity // PAGE, math.ceil(self.tokens / PAGE)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(WORKSPACE, dtype=torch.uint8, device=device), "NHD", use_tensor_cores=True
        )
        first = torch.arange(batch, dtype=torch.int32, device=device)[:, None] * pages
        wrapper.plan(
            torch.arange(batch + 1, dtype=torch.int32) * each,
            (first + torch.arange(each, dtype=torch.int32, device=device)).flatten(),
            torch.full((batch,), (self.tokens - 1) % PAGE + 1, dtype=torch.int32),
            q_heads,
            heads,
            dim,
            PAGE,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        view = (batch * pages, PAGE, heads, dim)
        return "flashinfer", lambda query, keys, values: wrapper.run(query, (keys.view(view), values.view(view)))

    def _by_sdpa(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        held = slice(self.tokens)
        return torch.nn.functional.scaled_dot_product_attention(
            query.unsqueeze(2),
            keys[:, held].transpose(1, 2),
            values[:, held].transpose(1, 2),
            enable_gqa=True,
        )
