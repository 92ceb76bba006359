"""The compression that the layers of one cache share: grouping, timing, and layers that wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from .checks import blame
from .config import CompressionConfig
from .errors import UnsupportedModelError
from .observation import Observation
from .pipeline import Pending, Pipeline
from .plan import Scores
from .stopwatch import Stopwatch
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
        padding: the mask last read, which all layers of a pass share, and where each sequence starts by it.
        stopwatch: time spent on scoring, allocating and packing.
        failed: whether an error cut the prompt's pass short, so that only some layers hold it.
        scores: scores of each layer and group, if they are kept.
        waiting: layers that are scored and not packed yet.
    """

    model_config: Any
    pipeline: Pipeline
    keep_scores: bool = False
    prompt_lengths: list[int] = field(default_factory=list)
    padding: tuple[ReferenceType[Tensor], list[int]] | None = None
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
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
        starts = [0] * batch if mask is None else self._starts(mask, tokens)
        self.prompt_lengths = [tokens - start for start in starts]
        check_window(self.model_config, max(self.prompt_lengths))
        return [Group([r for r, s in enumerate(starts) if s == start], start) for start in sorted(set(starts))]

    def _starts(self, mask: Tensor, tokens: int) -> list[int]:
        """Where each sequence starts behind its padding; the device is asked once for all layers."""
        if self.padding is None or self.padding[0]() is not mask:
            real = mask[:, :tokens].long()
            outside = (real.diff(dim=1) < 0).sum().unsqueeze(0)  # padding after a token
            *starts, misplaced = torch.cat([tokens - real.sum(1), outside]).tolist()
            if misplaced:
                raise UnsupportedModelError("the prompt is padded on the right or inside; pad on the left")
            if tokens in starts:
                raise UnsupportedModelError(f"sequence {starts.index(tokens)} of the batch has no tokens")
            self.padding = (ref(mask), starts)
        return self.padding[1]

    def compress(self, layer: CompressedLayer, groups: list[Group], observations: list[Observation]) -> None:
        """Compress one layer, or keep it until the last one where the whole model shares a budget."""
        # Whatever the caller records: what the cache holds must not keep a graph, and 16-bit keys with it.
        with self.stopwatch.running(observations[0].keys.device), torch.no_grad():
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
            if unpadded and plans[0].whole:
                entry.layer.store_whole(first.keys, first.values)
                continue
            segments = [self.pipeline.pack(p, plan) for p, plan in zip(entry.pending, plans, strict=True)]
            # All rows share one tail, which has to reach as far as the widest of their types.
            widest = max((p.keys.dtype for p in entry.pending), key=lambda dtype: torch.finfo(dtype).max)
            joined = None
            if len(segments) > 1:
                with blame(f"format {self.pipeline.config.format!r}", f"layer {entry.layer.index}"):
                    joined = self.pipeline.format.join(segments, [group.rows for group in entry.groups])
            segments, whole = joined or (segments, None)
            entry.layer.store(entry.groups, segments, whole, widest)

    @contextmanager
    def prompt_pass(self) -> Iterator[None]:
        """Note an error in the prompt's pass; the cache then starts over."""
        try:
            yield
        except BaseException:
            self.failed = True
            raise

    @property
    def seconds(self) -> float:
        """Seconds spent on scoring, allocating and packing; waits for a GPU that is still at it."""
        return self.stopwatch.seconds

    def fork(self) -> Session:
        """A session that knows the same of the prompt, for another cache."""
        return replace(self, prompt_lengths=[*self.prompt_lengths], padding=None, scores={**self.scores}, waiting=[])

    def reset(self) -> None:
        """Forget the prompt."""
        self.prompt_lengths, self.padding, self.stopwatch, self.failed = [], None, Stopwatch(), False
        self.scores.clear()
        self.waiting.clear()
