"""The compression that the layers of one cache share: grouping, timing, and layers that wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from .checks import blame
from .config import CompressionConfig
from .errors import RdkvError, UnsupportedModelError
from .interfaces import CacheFormat, PackedSegment
from .observation import Observation
from .pipeline import Pending, Pipeline, Planned
from .plan import Scores
from .registry import load_registry
from .stopwatch import Stopwatch
from .support import check_window

if TYPE_CHECKING:
    from .layer import CompressedLayer


@dataclass(frozen=True)
class Group:
    """Sequences of one length: their rows in the batch, and where their tokens start behind the padding."""

    rows: list[int]
    start: int


def groups_of(starts: list[int]) -> list[Group]:
    """Rows by where their tokens start, those without padding first."""
    return [Group([r for r, s in enumerate(starts) if s == start], start) for start in sorted(set(starts))]


@dataclass
class Waiting:
    """A scored layer that waits for the rest of the model (scope ``model``)."""

    layer: CompressedLayer
    groups: list[Group]
    pending: list[Pending]


@dataclass
class Packing:
    """A layer that is being packed; its 16-bit keys and values live until it is finished.

    Attributes:
        finish: gives the segment of each group.
        dtype: of the tail, which all rows share: it has to reach as far as the widest of their types.
    """

    layer: CompressedLayer
    groups: list[Group]
    finish: list[Callable[[], PackedSegment]]
    dtype: torch.dtype


@dataclass
class Session:
    """One cache's pipeline and what it has seen so far.

    Attributes:
        config: what compresses, see `pipeline`.
        prompt_lengths: real tokens of each sequence's prompt, once it is known.
        padding: the mask last read, which all layers of a pass share, and where each sequence starts by it.
        stopwatch: time spent on scoring, allocating and packing.
        underway: whether some layers hold the prompt and the last one does not yet.
        failed: whether an error cut the prompt's pass short, so that only some layers hold it.
        scores: scores of each layer and group, if they are kept.
        waiting: layers that are scored and not packed yet.
        packing: the layer whose packing is begun and not finished.
    """

    model_config: Any
    config: CompressionConfig
    keep_scores: bool = False
    prompt_lengths: list[int] = field(default_factory=list)
    padding: tuple[ReferenceType[Tensor], list[int]] | None = None
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    underway: bool = False
    failed: bool = False
    scores: dict[int, list[Scores]] = field(default_factory=dict)
    waiting: list[Waiting] = field(default_factory=list)
    packing: Packing | None = None

    @classmethod
    def start(cls, model_config: Any, config: CompressionConfig, keep_scores: bool) -> Session:
        """A session for a model; its plugins are loaded and their options checked."""
        session = cls(model_config, config, keep_scores)
        session.pipeline  # noqa: B018
        return session

    @cached_property
    def pipeline(self) -> Pipeline:
        """The configuration's plugins; a prompt that was loaded does without, until another one is compressed."""
        return Pipeline(self.model_config, self.config)

    @cached_property
    def format(self) -> CacheFormat:
        """The configuration's cache format alone, which is all that a stored prompt asks for."""
        return load_registry(self.config.plugins).format(self.config.format, self.config.format_options)

    def groups(self, mask: Tensor | None, keys: Tensor) -> list[Group]:
        """Sequences of the prompt by length, from the padding ``mask`` ``[B, T]`` (None: no padding).

        Raises:
            UnsupportedModelError: padding that is not on the left, an empty sequence, too long a prompt.
        """
        batch, tokens = keys.shape[0], keys.shape[2]
        starts = [0] * batch if mask is None else self._starts(mask, tokens)
        self.prompt_lengths = [tokens - start for start in starts]
        check_window(self.model_config, max(self.prompt_lengths))
        return groups_of(starts)

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
        """Begin to compress one layer, or keep it until the last one where the whole model shares a budget.

        Packing waits for the device, to know how large the result is. The layer is finished when the next one is
        entered: by then the device has this layer's projection and MLP to work on, and the host's wait costs nothing.
        """
        self.underway = layer.index < self.pipeline.layers - 1
        with self._measured(layer):
            pending = [self.pipeline.score(observation) for observation in observations]
            if self.keep_scores:
                self.scores[layer.index] = [p.scores for p in pending]
            self.waiting.append(Waiting(layer, groups, pending))
            if self.pipeline.whole_model and self.underway:
                return
            for plans in self._allocate():
                self._begin(self.waiting.pop(0), plans)
            if not self.underway:
                self._finish()

    def enter(self, layer: CompressedLayer) -> None:
        """Finish the layer before ``layer``, which gets keys and values.

        Raises:
            PluginError: of the layer that is finished.
            RdkvError: ``layer`` has its part of the prompt already, while others wait for theirs.
        """
        if self.underway and layer.is_initialized:
            with self.prompt_pass():
                raise RdkvError(
                    "the pass over the prompt ended before its last layer, so that only some layers hold it; "
                    "run the model with the whole prompt again"
                )
        self.finish()

    def finish(self) -> None:
        """Finish the layer that is being packed, if there is one.

        Raises:
            PluginError: whatever is wrong with it.
        """
        if self.packing is not None:
            with self.prompt_pass(), self._measured(self.packing.layer):
                self._finish()

    def _allocate(self) -> list[tuple[Planned, ...]]:
        """Plans of the layers that wait, for each of their groups."""
        by_group = zip(*(waiting.pending for waiting in self.waiting), strict=True)
        return list(zip(*(self.pipeline.allocate(list(layers)) for layers in by_group), strict=True))

    def _begin(self, waiting: Waiting, plans: tuple[Planned, ...]) -> None:
        """Begin to pack a layer, and finish the one that was begun before."""
        layer, groups, pending = waiting.layer, waiting.groups, waiting.pending
        if len(groups) == 1 and groups[0].start == 0 and plans[0].whole:
            layer.store_whole(pending[0].keys, pending[0].values)
            return
        finish = [self.pipeline.begin(p, plan) for p, plan in zip(pending, plans, strict=True)]
        widest = max((p.keys.dtype for p in pending), key=lambda dtype: torch.finfo(dtype).max)
        self._finish()
        self.packing = Packing(layer, groups, finish, widest)

    def _finish(self) -> None:
        packing, self.packing = self.packing, None
        if packing is None:
            return
        segments, joined = [finish() for finish in packing.finish], None
        if len(segments) > 1:
            with blame(f"format {self.pipeline.config.format!r}", f"layer {packing.layer.index}"):
                joined = self.pipeline.format.join(segments, [group.rows for group in packing.groups])
        segments, whole = joined or (segments, None)
        packing.layer.store(packing.groups, segments, whole, packing.dtype)

    @contextmanager
    def _measured(self, layer: CompressedLayer) -> Iterator[None]:
        """Compress on the stopwatch, and without a graph, whatever the caller records: the cache must not keep one."""
        with self.stopwatch.running(layer.device), torch.no_grad():
            yield

    @contextmanager
    def prompt_pass(self) -> Iterator[None]:
        """Note an error in the prompt's pass, and drop what is not packed; the cache then starts over."""
        try:
            yield
        except BaseException:
            self.failed, self.packing = True, None
            self.waiting.clear()
            raise

    @property
    def seconds(self) -> float:
        """Seconds spent on scoring, allocating and packing; waits for a GPU that is still at it."""
        self.finish()
        return self.stopwatch.seconds

    def fork(self) -> Session:
        """A session that knows the same of the prompt, for another cache."""
        fork = copy(self)  # its plugins, too
        fork.prompt_lengths, fork.scores = [*self.prompt_lengths], {**self.scores}
        fork.padding, fork.waiting, fork.packing = None, [], None
        return fork

    def reset(self) -> None:
        """Forget the prompt."""
        self.prompt_lengths, self.padding, self.stopwatch, self.failed = [], None, Stopwatch(), False
        self.underway, self.packing = False, None
        self.scores.clear()
        self.waiting.clear()
