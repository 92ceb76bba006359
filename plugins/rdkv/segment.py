"""The packed prompt of the ``mixed-bit`` format: codes in digits of 4 and 2 bits, ragged per head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels import naive, naive_pack
from ...kernels.backends import Backend
from ...kernels.packed import PINNED, Packed, join
from ...kernels.tail import Tail
from ...runtime.errors import ConfigError
from ...runtime.interfaces import PackedSegment
from ...runtime.plan import BitPlan
from .positions import Positions


@dataclass(frozen=True, eq=False)
class MixedBitSegment(PackedSegment):
    """One layer's prompt at the bits of its plan.

    Keys of coded tokens are quantised per channel over those tokens, values per token over the channels, under a
    rotation (`kernels.naive_rotation`); both asymmetric uniform with float16 scale and zero point. Pinned tokens, and
    those of a head that quantises nothing, are stored as they are.

    Attributes:
        packed: what decoding reads.
        tokens: ``T``, kept or not.
        positions: None if they were not kept.
        rows: the sequences of ``packed`` that are the segment's, if it shares it with others (`join_segments`).
    """

    packed: Packed
    tokens: int
    positions: Positions | None
    rows: tuple[int, ...] | None = None

    @property
    def own(self) -> Packed:
        """The segment's part of ``packed``."""
        return self.packed if self.rows is None else take_sequences(self.packed, self.rows)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.packed.tensors()
        if self.positions is not None:
            yield from self.positions.tensors()

    def attend(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        keys, values, held = self.unpack()
        return naive.attention(query, keys, values, scale, held.unsqueeze(2))

    def attend_with_tail(
        self, query: Tensor, scale: float, tail: Tail | None, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        return backend.attend(query, self.own, scale, tail)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        packed = self.own
        view = (packed.batch, packed.heads, packed.slots)
        keys, values, held = naive_pack.unpack(packed)
        return keys.reshape(*view, packed.dim), values.reshape(*view, packed.dim), held.reshape(view)

    def plan(self) -> BitPlan:
        if self.positions is None:
            raise ConfigError("the plan was not kept: set the format option positions=true")
        packed = self.own
        view = (packed.batch, packed.heads, -1)
        pinned = [row[PINNED] - raw for row, raw in zip(packed.host_counts, packed.raw, strict=True)]
        bits, is_pinned = self.positions.plan(self.tokens, torch.tensor(pinned))
        return BitPlan(bits.reshape(view), naive_pack.key_widths(packed).reshape(view), is_pinned.reshape(view))


def join_segments(
    segments: Sequence[MixedBitSegment], rows: Sequence[Sequence[int]]
) -> tuple[list[PackedSegment], PackedSegment]:
    """Segments that share one `Packed` of all sequences of a batch, and the segment of all of it.

    Args:
        segments: of one storage type; one that is given more than once is stored once.
        rows: the rows of the batch that are each segment's.
    """
    distinct = list(dict.fromkeys(segments))
    sizes = [segment.own.batch for segment in distinct]
    first = {segment: sum(sizes[:i]) for i, segment in enumerate(distinct)}
    # For each row of the batch, its sequence among those of the distinct segments.
    places = {r: first[segment] + i for segment, part in zip(segments, rows, strict=True) for i, r in enumerate(part)}
    order = [places[row] for row in sorted(places)]
    packed = distinct[0].own if len(distinct) == 1 else join([s.own for s in distinct], range(sum(sizes)))
    if order != list(range(packed.batch)):
        packed = take_sequences(packed, order)
    shared: list[PackedSegment] = [
        replace(segment, packed=packed, rows=tuple(part)) for segment, part in zip(segments, rows, strict=True)
    ]
    return shared, MixedBitSegment(packed, max(segment.tokens for segment in segments), positions=None)


def concatenate_segments(segments: Sequence[MixedBitSegment]) -> MixedBitSegment:
    """Segments of the same sequences as one, whose `Packed` has them all: those of the first, of the second, and so on.

    An attention backend takes what it has beyond the sequences of a query for parts of the same ones.
    """
    packed = join([s.own for s in segments], range(sum(s.own.batch for s in segments)))
    return MixedBitSegment(packed, sum(s.tokens for s in segments), positions=None)


def take_sequences(packed: Packed, sequences: Sequence[int]) -> Packed:
    """Some sequences of ``packed``; what is flat is shared with it."""
    rows = [sequence * packed.heads + head for sequence in sequences for head in range(packed.heads)]
    index = torch.tensor(rows, device=packed.counts.device)
    return replace(
        packed,
        batch=len(sequences),
        host_counts=tuple(packed.host_counts[row] for row in rows),
        raw=tuple(packed.raw[row] for row in rows),
        key_affine=packed.key_affine[index],
        counts=packed.counts[index],
        starts=packed.starts[index],
    )
