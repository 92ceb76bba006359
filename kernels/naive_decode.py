"""Decode attention over a packed prompt and its tail in plain PyTorch: what `decode.attend` computes."""

from __future__ import annotations

from torch import Tensor

from . import naive, naive_pack
from .packed import Packed
from .tail import Tail, with_tail


def attend(query: Tensor, packed: Packed, scale: float, tail: Tail | None = None) -> tuple[Tensor, Tensor]:
    """Attention of ``query`` ``[B, H_q, Q, D]`` over all that is held, in float32, as `decode.attend`."""
    view = (packed.batch, packed.heads, packed.slots)
    keys, values, held = naive_pack.unpack(packed)
    keys, values = keys.reshape(*view, packed.dim), values.reshape(*view, packed.dim)
    output, lse = naive.attention(query, keys, values, scale, held.reshape(view).unsqueeze(2))
    return with_tail(output, lse, query, scale, tail)
