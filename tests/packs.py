"""Random packed prompts and tails for tests of what attends to them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rdkv.kernels import naive_pack
from rdkv.kernels.packed import Packed
from rdkv.kernels.tail import Tail

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton, or its interpreter, is
WIDTHS = torch.tensor([0, 2, 4, 8, 16], dtype=torch.uint8)


def random_packed(
    batch: int = 2,
    heads: int = 2,
    tokens: int = 90,
    dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: str = DEVICE,
) -> Packed:
    """A prompt of every width; the first head has no pinned token, the last one nothing but pinned ones."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, batch, heads, tokens, dim).to(dtype)
    value_bits = WIDTHS[torch.randint(5, (batch, heads, tokens))]
    key_bits = WIDTHS[torch.randint(5, (batch, heads, dim))]
    pinned = (torch.arange(tokens) < 3).repeat(batch, heads, 1)
    pinned[0, 0] = False
    value_bits[-1, -1] = 0
    packed = naive_pack.pack(keys, values, value_bits, key_bits, pinned)
    return to_device(packed, device)


def random_tail(packed: Packed, length: int = 5, capacity: int = 16, dtype: torch.dtype = torch.bfloat16) -> Tail:
    """A tail of equal lengths, with NaN behind its end."""
    device = packed.counts.device
    keys, values = torch.randn(2, packed.batch, packed.heads, capacity, packed.dim, device=device).to(dtype)
    keys[:, :, length:], values[:, :, length:] = float("nan"), float("nan")
    lengths = torch.full((packed.batch,), length, dtype=torch.int32, device=device)
    return Tail(keys, values, lengths, length)


def random_query(packed: Packed, group: int = 2, new: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``[B, H * group, new, D]``."""
    return torch.randn(packed.batch, packed.heads * group, new, packed.dim).to(packed.counts.device, dtype)


def to_device(packed: Packed, device: str = DEVICE) -> Packed:
    """The same on another device."""
    return replace(packed, **{k: v.to(device) for k, v in vars(packed).items() if isinstance(v, Tensor)})
