"""Layers of prompts in SGLang's pool, packed into the arena."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.arena import Arena
from ...kernels.packed import HostCounts, Packed
from ...runtime.errors import ConfigError, RdkvError
from ...runtime.interfaces import PackedSegment
from ...runtime.observation import Observation
from ...runtime.pipeline import Pipeline


class Compressor:
    """Packs layers; everything runs on the current stream, that of the pass that reads the prompt's last token.

    Attributes:
        host_counts: of the prompts in the arena, by place and layer.
    """

    def __init__(self, pipeline: Pipeline, arena: Arena, pool: Any, requests: Any) -> None:
        if pipeline.whole_model:
            raise ConfigError(
                f"allocator {pipeline.config.allocator!r} shares a budget over the whole model, and a layer of the "
                "arena has its own; set its scope to 'head' or 'layer' in --rdkv-config"
            )
        self.pipeline, self.arena = pipeline, arena
        self.host_counts: dict[int, list[HostCounts]] = {}
        self._pool, self._requests = pool, requests

    def check_format(self, tokens: int) -> None:
        """Refuse a cache format that the arena cannot hold; ``tokens`` are those of a prompt to try it with.

        Raises:
            ConfigError: one line that names it.
        """
        shape, device = self.arena.shape, self.arena.counts.device
        keys, values = torch.zeros(2, 1, shape.heads, tokens, shape.dim, dtype=shape.dtype, device=device)
        pending = self.pipeline.score(Observation(keys, values, keys, 1.0, 0))
        (plan,) = self.pipeline.allocate([pending])
        if self._packed(self.pipeline.begin(pending, plan)()) is None:
            raise ConfigError(
                f"format {self.pipeline.config.format!r} cannot be served by SGLang: its segments have no 'packed', "
                'which is what the decode kernels read; set "format" to "mixed-bit" in --rdkv-config'
            )

    def _packed(self, segment: PackedSegment) -> Packed | None:
        packed = getattr(segment, "packed", None)
        return packed if isinstance(packed, Packed) else None

    def skip(self, place: int) -> None:
        """Note that the prompt at ``place`` stays in SGLang's pool."""
        self.arena.clear(place)
        self.host_counts.pop(place, None)

    def begin(self, layer: int, slots: Tensor, queries: Tensor, scale: float) -> Callable[[], PackedSegment]:
        """Begin to pack the tokens at ``slots`` of the pool; see `Pipeline.begin`."""
        keys, values = (
            buffer[slots].transpose(0, 1).unsqueeze(0)  # [1, H, T, D]
            for buffer in (self._pool.get_key_buffer(layer), self._pool.get_value_buffer(layer))
        )
        pending = self.pipeline.score(Observation(keys, values, queries, scale, layer))
        (plan,) = self.pipeline.allocate([pending])
        return self.pipeline.begin(pending, plan)

    def finish(
        self, layer: int, finish: Callable[[], PackedSegment], place: int, region: slice
    ) -> tuple[int, HostCounts]:
        """Finish a layer and copy it into the arena; its bytes there, and its counts."""
        packed = self._packed(finish())
        assert packed is not None, self.pipeline.config.format
        if packed.pinned_keys.numel() and packed.pinned_keys.dtype != self.arena.shape.dtype:
            raise RdkvError(
                f"layer {layer}: keys or values exceed the range of {self.arena.shape.dtype}; serve in bfloat16"
            )
        return self.arena.write(layer, place, region, packed), packed.host_counts

    def slots(self, place: int, tokens: int) -> Tensor:
        """Where the pool has the first ``tokens`` tokens of a row, ``[T]``."""
        slots: Tensor = self._requests.req_to_token[place, :tokens].long()
        return slots
