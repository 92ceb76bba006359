"""Sizes of an arena: what a prompt takes of it, and which bytes of a layer's store are a region's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

import torch

from .packed import PINNED_START, VALUE_EXPONENT

ALIGNMENT = 64  # bytes, of every part of a region
EVEN = 1 << 20  # share of a layer whose store has the mean of all


@dataclass(frozen=True)
class ArenaShape:
    """What an arena holds.

    Regions are spans of one layer's store of mean size, the same for all layers; each layer has its share of a region,
    so that regions that do not overlap there overlap in no layer.

    Attributes:
        shares: ``[L]``, above 0, bytes of each layer's store over the mean, in parts of `EVEN`.
        heads, dim: KV heads of this process, and their dimension.
        span: as `Packed.span`.
        dtype: storage type of what is not quantised.
        places: prompts at once.
        nbytes: mean bytes of a layer's store, a multiple of `unit`.
    """

    shares: tuple[int, ...]
    heads: int
    dim: int
    span: int
    dtype: torch.dtype
    places: int
    nbytes: int

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return len(self.shares)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of a pinned token: key and value side by side."""
        return 2 * self.dim * self.dtype.itemsize

    @property
    def unit(self) -> int:
        """Regions, and a layer's parts of them, start and end at multiples of so many bytes."""
        return lcm(self.pinned_bytes, ALIGNMENT)

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables of one place in one layer."""
        return self.heads * (4 * self.dim + 4 * (VALUE_EXPONENT + 1) + 8 * (PINNED_START + 1))

    @property
    def store_bytes(self) -> tuple[int, ...]:
        """Bytes of each layer's store, ``[L]``."""
        return tuple(self.part(layer, slice(0, self.nbytes)).stop for layer in range(self.layers))

    def part(self, layer: int, region: slice) -> slice:
        """The bytes of a layer's store that are its part of a region.

        In whole numbers, so that every rank has the same, and regions side by side have parts side by side.

        Args:
            region: between multiples of `unit`.
        """
        units = (at // self.unit * self.shares[layer] // EVEN for at in (region.start, region.stop))
        return slice(*(at * self.unit for at in units))

    def layer_bytes(self, packed_bytes: int) -> int:
        """Bytes of a layer, a multiple of `unit`, that hold prompts whose flat tensors take ``packed_bytes`` there."""
        return -(-(packed_bytes + 4 * ALIGNMENT) // self.unit) * self.unit

    def region_bytes(self, needs: Sequence[int]) -> int:
        """Bytes of a region whose part of each layer has that layer's bytes ``needs`` ``[L]``, wherever it starts."""
        units = [-(-need // self.unit) for need in needs]
        # Enough for a region at 0 is enough for all: floor(a + b) - floor(a) is never less than floor(b).
        return max(-(-n * EVEN // share) for n, share in zip(units, self.shares, strict=True)) * self.unit
