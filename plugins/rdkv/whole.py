"""Segments of the two extreme plans: everything kept as it is, and nothing kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import naive
from ...kernels.packed import Packed, unquantised
from ...runtime.interfaces import PackedSegment
from ...runtime.plan import BitPlan


@dataclass(frozen=True)
class WholeSegment(PackedSegment):
    """An uncompressed prompt: ``keys`` and ``values`` ``[B, H, T, D]`` as the model made them."""

    keys: Tensor
    values: Tensor

    @property
    def packed(self) -> Packed:
        """The same as a segment of ``mixed-bit`` has."""
        return unquantised(self.keys, self.values)

    def attend(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return naive.attention(query, self.keys, self.values, scale)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        held = torch.ones(self.keys.shape[:3], dtype=torch.bool, device=self.keys.device)
        return self.keys.float(), self.values.float(), held

    def plan(self) -> BitPlan:
        batch, heads, tokens, dim = self.keys.shape
        return BitPlan.uniform((batch, heads, tokens, dim), 16, self.keys.device)

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.keys, self.values)


@dataclass(frozen=True)
class EmptySegment(PackedSegment):
    """A prompt of which the budget holds no token in any head: no bytes at all."""

    batch: int
    heads: int
    tokens: int
    dim: int
    device: torch.device

    @property
    def packed(self) -> Packed:
        """The same as a segment of ``mixed-bit`` has."""
        nothing = torch.zeros(self.batch, self.heads, 0, self.dim, dtype=torch.float16, device=self.device)
        return unquantised(nothing, nothing)

    def attend(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        keys, values, _ = self.unpack()
        return naive.attention(query, keys, values, scale)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        nothing = torch.zeros(self.batch, self.heads, 0, self.dim, device=self.device)
        return nothing, nothing, nothing[..., 0].bool()

    def plan(self) -> BitPlan:
        return BitPlan.uniform((self.batch, self.heads, self.tokens, self.dim), 0, self.device)

    def tensors(self) -> Iterator[Tensor]:
        yield from ()
