"""The compression that the layers of one cache share: grouping, timing, and layers that wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import CompressionConfig
from .errors import UnsupportedModelError
from .observation import Observation
from .pipeline import Pending, Pipeline
from .plan import Scores
from .support import check_window

if TYPE_CHECKING:
    from .layer import CompressedLayer


@dataclass(frozen=True)
class Group:
    """Sequences of one length: their rows in the batch, and where their tokens start behind the padding."""

    rows: list[int]
    start: int


@dataclass
class Waiting:
    """A scored layer that waits for the rest of the model (scope ``model``)."""

    layer: CompressedLayer
    groups: list[Group]
    pending: list[Pending]


@dataclass
class Session:
    """One cache's pipeline and what it has seen so far.

    Attributes:
        prompt_lengths: real tokens of each sequence's prompt, once it is known.
        seconds: time spent on scoring, allocating and packing.
        failed: whether an error cut the prompt's pass short, so that only some layers hold it.
        scores: scores of each layer and group, if they are kept.
        waiting: layers that are scored and not packed yet.
    """

    model_config: Any
    pipeline: Pipeline
    keep_scores: bool = False
    prompt_lengths: list[int] = field(default_factory=list)
    seconds: float = 0.0
    failed: bool = False
    scores: dict[int, list[Scores]] = field(default_factory=dict)
    waiting: list[Waiting] = field(default_factory=list)

    @classmethod
    def start(cls, model_config: Any, config: CompressionConfig, keep_scores: bool) -> Session:
        """A session for a model; its plugins are loaded and their options checked."""
        return cls(model_config, Pipeline(model_config, config), keep_scores)

    def groups(self, mask: Tensor | None, keys: Tensor) -> list[Group]:
        """Sequences of the prompt by length, from the padding ``mask`` ``[B, T]`` (None: no padding).

        Raises:
            UnsupportedModelError: padding that is not on the left, an empty sequence, too long a prompt.
        """
        batch, tokens = keys.shape[0], keys.shape[2]
        starts = [0] * batch
        if mask is not None:
            real = mask[:, :tokens].long()
            starts = (tokens - real.sum(1)).tolist()
            if bool((real.diff(dim=1) < 0).any()):
                raise UnsupportedModelError("the prompt is padded on the right or inside; pad on the left")
            if tokens in starts:
                raise UnsupportedModelError(f"sequence {starts.index(tokens)} of the batch has no tokens")
        self.prompt_lengths = [tokens - start for start in starts]
        check_window(self.model_config, max(self.prompt_lengths))
        return [Group([r for r, s in enumerate(starts) if s == start], start) for start in sorted(set(starts))]

    def compress(self, layer: CompressedLayer, groups: list[Group], observations: list[Observation]) -> None:
        """Compress one layer, or keep it until the last one where the whole model shares a budget."""
        # Whatever the caller records: what the cache holds must not keep a graph, and 16-bit keys with it.
        with self._timed(observations[0].keys.device), torch.no_grad():
            pending = [self.pipeline.score(observation) for observation in observations]
            if self.keep_scores:
                self.scores[layer.index] = [p.scores for p in pending]
            self.waiting.append(Waiting(layer, groups, pending))
            last = layer.index == self.pipeline.layers - 1
            if last or not self.pipeline.whole_model:
                waiting, self.waiting = self.waiting, []
                self._finish(waiting)

    def _finish(self, waiting: list[Waiting]) -> None:
        by_group = [self.pipeline.allocate(list(layers)) for layers in zip(*(w.pending for w in waiting), strict=True)]
        for entry, plans in zip(waiting, zip(*by_group, strict=True), strict=True):
            first = entry.pending[0]
            unpadded = len(entry.groups) == 1 and entry.groups[0].start == 0
            if unpadded and plans[0].is_identity:
                entry.layer.store_whole(first.keys, first.values)
                continue
            segments = [self.pipeline.pack(p, plan) for p, plan in zip(entry.pending, plans, strict=True)]
            # All rows share one tail, which has to reach as far as the widest of their types.
            widest = max((p.keys.dtype for p in entry.pending), key=lambda dtype: torch.finfo(dtype).max)
            entry.layer.store(entry.groups, segments, widest)

    @contextmanager
    def prompt_pass(self) -> Iterator[None]:
        """Note an error in the prompt's pass; the cache then starts over."""
        try:
            yield
        except BaseException:
            self.failed = True
            raise

    @contextmanager
    def _timed(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds += time.perf_counter() - begin

    def reset(self) -> None:
        """Forget the prompt."""
        self.prompt_lengths, self.seconds, self.failed = [], 0.0, False
        self.scores.clear()
        self.waiting.clear()
