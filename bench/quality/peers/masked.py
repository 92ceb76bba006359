"""Attention to a full cache of which each head sees its own part: what a press that masks means by evicting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rdkv.runtime.attention import causal_mask, link
from rdkv.runtime.errors import UnsupportedModelError


class MaskedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A full layer, and which of its tokens no head may look at any more.

    Args:
        keys, values: ``[B, H, T, D]``.
        evicted: ``[B, H, T]`` bool.
    """

    def __init__(self, keys: Tensor, values: Tensor, evicted: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.evicted = keys, values, evicted

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take the tokens of a forward pass, which every head sees."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return link(keys, self), values

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Exact attention to what is not evicted, output ``[B, Q, H_q, D]``."""
        if mask is not None:
            raise UnsupportedModelError("a masked cache takes prompts of one length, without padding")
        new, total = query.shape[2], key.shape[2]
        groups = query.shape[1] // key.shape[1]
        kept = ~torch.nn.functional.pad(self.evicted, (0, total - self.evicted.shape[2]))
        visible = causal_mask(new, total, None, query.device) & kept.repeat_interleave(groups, 1)[:, :, None]
        output, _ = sdpa_attention_forward(module, query, key, value, visible, scaling=scale)
        return output


def masked_cache(full: DynamicCache, evicted: list[Tensor]) -> Cache:
    """The cache ``full`` without each layer's ``evicted`` tokens, ``[B, H, T]`` bool."""
    layers: list[Any] = list(full.layers)
    pairs = zip(layers, evicted, strict=True)
    return Cache(layers=[MaskedLayer(layer.keys, layer.values, mask) for layer, mask in pairs])
