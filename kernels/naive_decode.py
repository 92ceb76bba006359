"""Decode attention over a packed prompt and its tail in plain PyTorch: what `decode.attend` computes."""

from __future__ import annotations

from torch import Tensor

from . import naive, naive_pack
from .packed import Packed
from .tail import Tail, with_tail


def attend(query: Tensor, packed: Packed, scale: float, tail: Tail | None = None) -> tuple[Tensor, Tensor]:
    """Attention of ``query`` ``[B, H_q, Q, D]`` over all that is held, in float32, as `decode.attend`."""
    keys, values, held = (_side_by_side(flat, packed, len(query)) for flat in naive_pack.unpack(packed))
    output, lse = naive.attention(query, keys, values, scale, held.unsqueeze(2))
    return with_tail(output, lse, query, scale, tail)


def _side_by_side(flat: Tensor, packed: Packed, batch: int) -> Tensor:
    """``[n * B * H, N, ...]`` of all rows as ``[B, H, n * N, ...]``, the parts of a sequence one after the other."""
    parts = packed.batch // batch
    apart = flat.view(parts, batch, packed.heads, packed.slots, *flat.shape[2:])
    return apart.movedim(0, 2).reshape(batch, packed.heads, parts * packed.slots, *flat.shape[2:])
