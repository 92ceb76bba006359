"""The packed prompt of the ``mixed-bit`` format: codes in 2-bit planes, ragged per head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import naive, naive_pack
from ...kernels.packed import PINNED, Packed
from ...runtime.errors import ConfigError
from ...runtime.interfaces import PackedSegment
from ...runtime.plan import BitPlan
from .positions import Positions


@dataclass(frozen=True, eq=False)
class MixedBitSegment(PackedSegment):
    """One layer's prompt at the bits of its plan.

    Keys of coded tokens are quantised per channel over those tokens, values per token over the channels;
    both asymmetric uniform with float16 scale and zero point. Pinned tokens, and those of a head that
    quantises nothing, are stored as they are.

    Attributes:
        packed: what decoding reads.
        tokens: ``T``, kept or not.
        positions: None if they were not kept.
    """

    packed: Packed
    tokens: int
    positions: Positions | None

    def tensors(self) -> Iterator[Tensor]:
        yield from self.packed.tensors()
        if self.positions is not None:
            yield from self.positions.tensors()

    def attend(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        keys, values, held = self.unpack()
        return naive.attention(query, keys, values, scale, held.unsqueeze(2))

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        view = (self.packed.batch, self.packed.heads, self.packed.slots)
        keys, values, held = naive_pack.unpack(self.packed)
        return keys.reshape(*view, self.packed.dim), values.reshape(*view, self.packed.dim), held.reshape(view)

    def plan(self) -> BitPlan:
        if self.positions is None:
            raise ConfigError("the plan was not kept: set the format option positions=true")
        packed, view = self.packed, (self.packed.batch, self.packed.heads, -1)
        pinned = [row[PINNED] - raw for row, raw in zip(packed.host_counts, packed.raw, strict=True)]
        bits, is_pinned = self.positions.plan(self.tokens, torch.tensor(pinned))
        return BitPlan(bits.reshape(view), naive_pack.key_widths(packed).reshape(view), is_pinned.reshape(view))
