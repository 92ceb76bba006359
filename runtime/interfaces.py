"""What plugins implement: scorers, allocators and cache formats, and the data that passes between them.

Symbols: ``B`` sequences of equal length, ``H`` KV heads, ``T`` prompt tokens, ``D`` head dimension,
``H_q`` query heads, ``Q`` queries. Padding never reaches a plugin: the runtime calls it once for every
group of sequences of one length, so every position it sees is a real token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec
import torch
from torch import Tensor

from ..kernels.backends import Backend
from ..kernels.tail import Tail, with_tail
from .errors import RdkvError
from .ladder import Distortion, Ladder
from .observation import Observation
from .plan import BitPlan, Budget, Scores
from .storage import storage_bytes

Scope = Literal["head", "layer", "model"]


class PluginOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of a plugin's options; a plugin without any uses it as it is.

    Give every field a default, and a description through
    ``Annotated[int, msgspec.Meta(ge=1, description="...")]``: ``rdkv plugins NAME`` shows both.
    """


class Scorer(ABC):
    """Says what each token and channel of a prompt is worth."""

    Options: ClassVar[type[PluginOptions]] = PluginOptions

    def __init__(self, options: PluginOptions | None = None) -> None:
        self.options = options if options is not None else self.Options()

    @abstractmethod
    def score(self, observation: Observation) -> Scores:
        """Scores of one layer; ``observation`` has its keys, values and queries."""


class Allocator(ABC):
    """Turns scores into bits, never above the budget."""

    Options: ClassVar[type[PluginOptions]] = PluginOptions

    def __init__(self, options: PluginOptions | None = None) -> None:
        self.options = options if options is not None else self.Options()

    @property
    def scope(self) -> Scope:
        """Over what heads compete: none (``head``), those of a layer, or those of all layers."""
        return "head"

    @property
    def evicts(self) -> bool:
        """Whether it can drop tokens; one that cannot needs enough bytes in every layer, and budgets are even."""
        return True

    @abstractmethod
    def allocate(self, scores: Scores, ladder: Ladder, budget: Budget) -> BitPlan:
        """A plan whose ``ladder.cost`` is within ``budget.per_head`` for every head (scope ``head``),
        or whose sum over heads is within ``budget.total`` (scopes ``layer`` and ``model``).

        With scope ``model`` the heads of all layers come stacked in the head dimension.

        Raises:
            BudgetError: no plan fits.
        """


class PackedSegment(ABC):
    """Keys and values of ``B`` prompts of one length, packed. Immutable."""

    @abstractmethod
    def attend(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of ``query`` ``[B, H_q, Q, D]`` over the segment, all of which every query sees.

        Returns:
            Output ``[B, H_q, Q, D]`` float32 and log-sum-exp of the scaled logits to base 2,
            ``[B, H_q, Q]`` float32, minus infinity (and output 0) where a head holds no token.
        """

    def attend_with_tail(
        self, query: Tensor, scale: float, tail: Tail | None, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        """As `attend`, over the segment and the 16-bit tail after it, if there is one; this is what decoding calls.

        A format that has kernels overrides it to read both at once by ``backend``, the one that the user chose.

        Returns:
            As `attend`; with a tail the output may be in the type of ``query``.
        """
        del backend
        return with_tail(*self.attend(query, scale), query, scale, tail)

    @abstractmethod
    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values ``[B, H, N, D]`` float32 and ``[B, H, N]`` bool, which of the ``N`` slots hold
        a token (``N``: most kept tokens of any head). Slots are in no particular order of position."""

    @abstractmethod
    def plan(self) -> BitPlan:
        """The plan it was packed with."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Every tensor it holds; their storages are what ``nbytes`` adds up."""

    @property
    def nbytes(self) -> int:
        """Bytes really held: the storages of ``tensors()``, each counted once."""
        return storage_bytes(self.tensors())


class CacheFormat(ABC):
    """Stores keys and values at the bits that a plan gives them."""

    Options: ClassVar[type[PluginOptions]] = PluginOptions

    def __init__(self, options: PluginOptions | None = None) -> None:
        self.options = options if options is not None else self.Options()

    @abstractmethod
    def ladder(self, head_dim: int, tokens: int, distortion: Distortion | None = None) -> Ladder:
        """Levels for heads of ``head_dim`` channels over a prompt of ``tokens`` tokens, with the
        format's own distortions or calibrated ones."""

    @property
    def variant(self) -> str:
        """A word for options with which widths lose other than by default, so that models are calibrated for each."""
        return ""

    def shipped_calibration(self, fingerprint: str) -> Path | None:
        """The calibration file that the format brings along for a model's fingerprint; none by default."""
        return None

    @abstractmethod
    def pack(self, keys: Tensor, values: Tensor, plan: BitPlan) -> PackedSegment:
        """Pack ``keys`` and ``values`` ``[B, H, T, D]``, which are 16-bit floats (the storage type of
        everything that is not quantised).

        A plan that keeps everything (``plan.is_identity``) must cost no more than keys and values
        themselves, and one that keeps nothing, nothing: so `Ladder.cost` counts them.
        """

    def begin(self, keys: Tensor, values: Tensor, plan: BitPlan) -> Callable[[], PackedSegment]:
        """`pack` in two steps: begin, and return what finishes it.

        The runtime finishes a layer when the keys and values of the next one are there; the device has the rest of
        the layer to work on by then. A format whose host has to know what the device finds out sends for it here (to
        pinned memory, before an event), waits for it when it finishes, and so never lets the device run dry. The
        price is that keys and values live until then.

        By default all is packed here, and keys and values may go at once: a `pack` that waits for the device waits
        for all that it was given before, so that calling it later would keep them alive and hide nothing.

        Returns:
            What finishes it, called once, on the same stream.
        """
        segment = self.pack(keys, values, plan)
        return lambda: segment

    def join(
        self, segments: Sequence[PackedSegment], rows: Sequence[Sequence[int]]
    ) -> tuple[list[PackedSegment], PackedSegment] | None:
        """Prompts of several lengths as one segment, so that a batch is decoded at once; None if they stay apart.

        Args:
            segments: one for every group of sequences of one length, as `pack` made them; the same one may
                occur more than once, for a prompt that several rows continue.
            rows: the sequences of each, as rows of the batch.

        Returns:
            Segments in place of the given ones, and one of all sequences in the batch's order, of which only
            `PackedSegment.attend_with_tail` is used. Together they hold no more bytes than the given ones.
        """
        return None

    def concatenate(self, segments: Sequence[PackedSegment]) -> PackedSegment | None:
        """Packed tokens of the same sequences, in their order, as one segment to attend to; None if they stay apart.

        Args:
            segments: each of all sequences of a batch, as `pack`, `join` (the second thing that it returns) and this
                made them.

        Returns:
            A segment of which only `PackedSegment.attend_with_tail` is used, and which shares nothing with the given.
        """
        return None

    def dump(self, segment: PackedSegment) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file has to hold for `load`: tensors by name, and what else there is to know, as JSON has it.

        A segment that `join` made share its tensors gives its own part; what is loaded is joined again.

        Raises:
            RdkvError: this format has no form on disk; so it is without an override.
        """
        raise RdkvError(f"{type(self).__name__} cannot be saved: the format has no dump() and load()")

    def load(
        self,
        tensors: Mapping[str, Tensor],
        header: Mapping[str, Any],
        shape: tuple[int, int, int, int],
        device: torch.device,
    ) -> PackedSegment:
        """The segment that `dump` took apart, to the bit.

        The tensors may say anything: whatever decoding relies on has to be checked, and nothing may be allocated
        that ``shape`` and the tensors do not account for.

        Args:
            tensors, header: as `dump` gave them; tensors are on ``device``, contiguous, and the segment's to keep.
            shape: ``(B, H, T, D)`` of the prompt.
            device: where the segment belongs.

        Raises:
            ValueError: what is wrong with them.
        """
        raise RdkvError(f"{type(self).__name__} cannot be loaded: the format has no dump() and load()")
