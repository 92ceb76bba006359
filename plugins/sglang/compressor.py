"""A prompt that SGLang has read, packed layer by layer from its pool into the arena."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.arena import Arena
from ...kernels.packed import HostCounts, Packed
from ...runtime.errors import ConfigError, RdkvError
from ...runtime.interfaces import PackedSegment
from ...runtime.observation import Observation
from ...runtime.pipeline import Pipeline
from .windows import QueryWindows


@dataclass(frozen=True)
class Done:
    """What packing a prompt came to.

    Attributes:
        nbytes, full_nbytes: bytes of the packed prompt, and of the same tokens at 16 bits, over all layers.
        seconds: on the host, which waits for each layer's sizes.
    """

    nbytes: int
    full_nbytes: int
    seconds: float


class Compressor:
    """Packs prompts; everything runs on the current stream, after the pass that read the prompt's last token.

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

    def compress(self, place: int, tokens: int, region: slice, windows: QueryWindows, owner: str) -> Done:
        """Pack the first ``tokens`` tokens of a request's row into its region.

        Args:
            place: the request's row in SGLang's tables.
            region: bytes of each layer.
            windows: where the queries of ``owner`` are.
        """
        start, used = time.perf_counter(), 0
        slots = self._requests.req_to_token[place, :tokens].long()
        counts: list[HostCounts] = []
        ahead: tuple[int, Callable[[], PackedSegment]] | None = None
        for layer in range(self.arena.shape.layers):
            queries = windows.take(owner, layer)
            begun = layer, self._begin(layer, slots, queries, windows.scales[layer])
            if ahead is not None:  # the device has this layer to score by now, and is not idle while the host waits
                used += self._finish(*ahead, place, region, counts)
            ahead = begun
        assert ahead is not None
        used += self._finish(*ahead, place, region, counts)
        self.arena.prompt_tokens[place] = tokens
        self.host_counts[place] = counts
        shape = self.arena.shape
        full = shape.layers * shape.heads * tokens * 4 * shape.dim
        return Done(used + shape.layers * shape.table_bytes, full, time.perf_counter() - start)

    def skip(self, place: int) -> None:
        """Note that the prompt at ``place`` stays in SGLang's pool."""
        self.arena.clear(place)
        self.host_counts.pop(place, None)

    def _begin(self, layer: int, slots: Tensor, queries: Tensor, scale: float) -> Callable[[], PackedSegment]:
        keys, values = (
            buffer[slots].transpose(0, 1).unsqueeze(0)  # [1, H, T, D]
            for buffer in (self._pool.get_key_buffer(layer), self._pool.get_value_buffer(layer))
        )
        pending = self.pipeline.score(Observation(keys, values, queries, scale, layer))
        (plan,) = self.pipeline.allocate([pending])
        return self.pipeline.begin(pending, plan)

    def _finish(
        self,
        layer: int,
        finish: Callable[[], PackedSegment],
        place: int,
        region: slice,
        counts: list[HostCounts],
    ) -> int:
        """Finish a layer and copy it into the arena; returns its bytes there."""
        packed = self._packed(finish())
        assert packed is not None, self.pipeline.config.format
        if packed.pinned_keys.numel() and packed.pinned_keys.dtype != self.arena.shape.dtype:
            raise RdkvError(
                f"layer {layer}: keys or values exceed the range of {self.arena.shape.dtype}; serve in bfloat16"
            )
        counts.append(packed.host_counts)
        return self.arena.write(layer, place, region, packed)
