"""Which prompt positions a packed segment holds, and at what width; only `PackedSegment.plan` needs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import naive
from ...kernels.available import kernels_for
from ...kernels.naive_positions import VALUE_CLASSES


@dataclass(frozen=True, eq=False)
class Positions:
    """Positions of ``R`` rows of ``T`` tokens: a bit for each, 2 for each one kept, 32 for each one pinned.

    Attributes:
        kept: ``[R, ceil(T / 8)]`` uint8, one bit a token, pinned tokens left out.
        classes: ``[ceil(kept / 4)]`` uint8, 2 bits a kept token, row by row in order of position.
        pinned: ``[pinned]`` int32, positions row by row.
    """

    kept: Tensor
    classes: Tensor
    pinned: Tensor

    @classmethod
    def of(cls, bits: Tensor, pinned: Tensor, kept_total: int, pinned_total: int) -> Positions:
        """Positions of a plan; the device is not waited for.

        Args:
            bits, pinned: ``[R, T]`` uint8 and bool.
            kept_total, pinned_total: how many tokens of all rows are kept without being pinned, and pinned.
        """
        return cls(*kernels_for("positions", bits).listed(bits, pinned, kept_total, pinned_total))

    def plan(self, tokens: int, pinned: Tensor) -> tuple[Tensor, Tensor]:
        """Bits of each token (16 for pinned ones) and whether it is pinned, ``[R, tokens]`` uint8 and bool.

        Args:
            pinned: ``[R]``, pinned tokens of each row.
        """
        kept = naive.unpack_bits(self.kept, 1, tokens).bool()
        table = torch.tensor(VALUE_CLASSES, dtype=torch.uint8, device=kept.device)
        bits = torch.zeros(kept.shape, dtype=torch.uint8, device=kept.device)
        bits[kept] = table[naive.unpack_bits(self.classes, 2, int(kept.sum())).long()]
        is_pinned = torch.zeros_like(kept)
        rows = torch.arange(kept.shape[0], device=kept.device).repeat_interleave(pinned.to(kept.device))
        is_pinned[rows, self.pinned.long()] = True
        return bits.masked_fill_(is_pinned, 16), is_pinned

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor held."""
        return self.kept, self.classes, self.pinned
