"""A prompt that is packed from SGLang's pool into the arena while its last tokens are read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...kernels.packed import HostCounts
from ...runtime.interfaces import PackedSegment
from .compressor import Compressor
from .windows import QueryWindows


@dataclass(frozen=True)
class Done:
    """What packing a prompt came to.

    Attributes:
        nbytes, full_nbytes: bytes of the packed prompt, and of the same tokens at 16 bits, over all layers.
        seconds: on the host, which works and waits while the device reads the prompt.
    """

    nbytes: int
    full_nbytes: int
    seconds: float


class Packing:
    """Packs each layer of a prompt as soon as its keys and values are there.

    A layer is finished when the next one has begun: the device has that layer's work by then, and is not idle while
    the host waits for sizes and launches what is to come.

    Args:
        place: the request's row in SGLang's tables, of which the first ``tokens`` are packed.
        region: bytes of the arena, of which each layer has its part.
        windows: where the queries of ``owner`` are.
    """

    def __init__(
        self, compressor: Compressor, place: int, tokens: int, region: slice, windows: QueryWindows, owner: str
    ) -> None:
        self.place, self.tokens, self.owner = place, tokens, owner
        self._compressor, self._region, self._windows = compressor, region, windows
        self._slots: Tensor | None = None
        self._ahead: tuple[int, Callable[[], PackedSegment]] | None = None
        self._counts: list[HostCounts] = []
        self._used, self._seconds = 0, 0.0

    def read(self, layer: int) -> None:
        """The layer's keys and values of the whole prompt are in the pool, and its window's queries are kept."""
        start = time.perf_counter()
        if self._slots is None:
            self._slots = self._compressor.slots(self.place, self.tokens)
        queries = self._windows.take(self.owner, layer)
        begun = layer, self._compressor.begin(layer, self._slots, queries, self._windows.scales[layer])
        self._finish_layer()
        self._ahead = begun
        self._seconds += time.perf_counter() - start

    def finish(self) -> Done:
        """All layers were read."""
        start, arena = time.perf_counter(), self._compressor.arena
        self._finish_layer()
        assert len(self._counts) == arena.shape.layers, self._counts
        arena.prompt_tokens[self.place] = self.tokens
        self._compressor.host_counts[self.place] = self._counts
        shape = arena.shape
        full = shape.layers * shape.heads * self.tokens * 4 * shape.dim
        seconds = self._seconds + time.perf_counter() - start
        return Done(self._used + shape.layers * shape.table_bytes, full, seconds)

    def _finish_layer(self) -> None:
        if self._ahead is not None:
            used, counts = self._compressor.finish(*self._ahead, self.place, self._region)
            self._used += used
            self._counts.append(counts)
            self._ahead = None
