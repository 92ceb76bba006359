"""The shape of a prompt's cache, and what its parts take at 16 bits."""

from __future__ import annotations

from dataclasses import dataclass

from ..method import Prompt

OFFSET_BYTES = 4  # where a head's tokens begin, in an int32
HALF_BYTES = 2


@dataclass(frozen=True)
class Shape:
    """``L`` layers of keys and values, ``[B, H, T, D]`` each."""

    layers: int
    batch: int
    heads: int
    tokens: int
    dim: int

    @classmethod
    def of(cls, prompt: Prompt) -> Shape:
        """The shape of a prompt's full cache, alike in every layer."""
        seen = prompt.recording.observations
        batch, heads, tokens, dim = seen[0].keys.shape
        return cls(len(seen), batch, heads, tokens, dim)

    @property
    def all_heads(self) -> int:
        """KV heads of all layers and sequences."""
        return self.layers * self.batch * self.heads

    @property
    def pairs(self) -> int:
        """Pairs of a key and a value."""
        return self.all_heads * self.tokens

    @property
    def pair_bytes(self) -> int:
        """A key and a value of one head."""
        return 2 * HALF_BYTES * self.dim

    @property
    def channel_map_bytes(self) -> int:
        """Which key channels of every head are left, a bit each."""
        return self.all_heads * ((self.dim + 7) // 8)

    @property
    def ragged_bytes(self) -> int:
        """What a cache whose heads differ in length needs besides: the offsets of its heads in every layer."""
        return OFFSET_BYTES * self.layers * self.batch * (self.heads + 1)
