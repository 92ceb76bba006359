"""A prompt that is read once with the full cache, and compressed any number of times, each as if it were read anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .attention import NAME, link, plain_attention
from .cache import CompressedCache
from .config import CompressionConfig
from .errors import RdkvError, UnsupportedModelError
from .observation import Observation
from .support import check_supported, text_config


class RecordedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of the full cache that keeps the queries of the prompt, too."""

    def __init__(self, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index
        self.seen: Observation | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the tokens of a forward pass."""
        if self.seen is not None:
            raise RdkvError("the recording holds its prompt; continue from its full() or a compress() of it")
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return link(key_states, self), value_states

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attention of the prompt, output ``[B, T, H_q, D]``, as a compressed cache computes it."""
        if mask is not None:
            raise UnsupportedModelError("a recording takes prompts of one length, without padding")
        self.seen = Observation(key, value, query, scale, self.index)
        return plain_attention(module, query, key, value, None, scale)[0]


class Recording(Cache):
    """Keys, values and queries of a prompt in every layer: what a compression sees of it.

    The first forward pass of an attached model is the prompt, ``[B, T]`` without padding; it costs the memory of the
    full cache and of the queries. `compress` then packs what `CompressedCache` would pack in a pass of its own, to
    the bit, without one: for comparing configurations on one prompt.

    Args:
        model_config: ``model.config``.

    Raises:
        UnsupportedModelError: the model cannot use a compressed cache.
    """

    def __init__(self, model_config: Any) -> None:
        check_supported(model_config)
        self.model_config = text_config(model_config)
        if self.model_config._attn_implementation != NAME:
            raise UnsupportedModelError("a recording needs the model's attention; call rdkv.attach(model) first")
        self.recorded = [RecordedLayer(i) for i in range(self.model_config.num_hidden_layers)]
        super().__init__(layers=list(self.recorded))

    @property
    def observations(self) -> list[Observation]:
        """What a scorer sees of each layer.

        Raises:
            RdkvError: there is no prompt yet.
        """
        found = [layer.seen for layer in self.recorded if layer.seen is not None]
        if len(found) < len(self.recorded):
            raise RdkvError("the recording holds no prompt yet; run the model with it first")
        return found

    def compress(self, config: CompressionConfig, keep_scores: bool = False) -> CompressedCache:
        """A cache of the recorded prompt, compressed by ``config``; arguments and errors of `CompressedCache`."""
        cache = CompressedCache(self.model_config, config, keep_scores)
        with torch.no_grad():
            for layer, observation in zip(cache.compressed_layers, self.observations, strict=True):
                layer.take(observation)
        return cache

    def full(self) -> DynamicCache:
        """A full cache of the recorded prompt that can be continued; what is recorded stays as it is."""
        cache = DynamicCache()
        for seen in self.observations:
            cache.update(seen.keys, seen.values, seen.layer)
        return cache
