"""What passes between scorer, allocator and cache format: scores, a bit plan, a budget.

Symbols: ``B`` sequences of equal length, ``H`` KV heads, ``T`` prompt tokens, ``D`` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """How much each token and channel is worth; only ratios matter.

    Attributes:
        token: ``[B, H, T]`` float32, finite, non-negative: loss of attention output if the token went.
        channel: ``[B, H, D]`` float32, finite, non-negative: the same for a channel of the keys.
        pinned: ``[B, H, T]`` bool or None: tokens whose key and value stay at 16 bits, outside the
            quantiser, as far as half of the budget holds them (first positions first).
    """

    token: Tensor
    channel: Tensor
    pinned: Tensor | None = None


@dataclass(frozen=True)
class BitPlan:
    """Bits for every token's value and every key channel.

    Attributes:
        value_bits: ``[B, H, T]`` uint8; 0 drops the token, its key included.
        key_bits: ``[B, H, D]`` uint8; width of the channel over the kept tokens, 0 keeps its mean alone.
        pinned: ``[B, H, T]`` bool; tokens whose key and value are both held at 16 bits.
    """

    value_bits: Tensor
    key_bits: Tensor
    pinned: Tensor

    @classmethod
    def uniform(cls, shape: tuple[int, int, int, int], bits: int, device: torch.device) -> BitPlan:
        """Every token and channel of ``shape`` ``(B, H, T, D)`` at ``bits``, nothing pinned."""
        batch, heads, tokens, dim = shape
        value_bits = torch.full((batch, heads, tokens), bits, dtype=torch.uint8, device=device)
        key_bits = torch.full((batch, heads, dim), bits, dtype=torch.uint8, device=device)
        return cls(value_bits, key_bits, torch.zeros_like(value_bits, dtype=torch.bool))

    @property
    def kept(self) -> Tensor:
        """Tokens that stay, ``[B, H, T]`` bool."""
        return self.pinned | (self.value_bits > 0)

    @property
    def is_identity(self) -> bool:
        """Whether every token and channel keeps 16 bits, so that nothing is compressed."""
        return bool((self.pinned | (self.value_bits == 16)).all() and (self.key_bits == 16).all())


@dataclass(frozen=True)
class Budget:
    """Bits that one sequence may take: ``per_head`` in each of its heads, or their sum if heads compete.

    ``heads`` counts the heads of the scope: those of a layer, or of all layers for scope ``model``.
    """

    per_head: int
    heads: int

    @property
    def total(self) -> int:
        """Bits of one sequence over all heads of the scope."""
        return self.per_head * self.heads
