"""Random packed prompts and tails for tests of what attends to them, and a slow reader of what is packed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rdkv.kernels import naive_pack
from rdkv.kernels.packed import (
    CHANNEL_BITS,
    COLUMN_START,
    COLUMNS,
    KEY_START,
    NIBBLES,
    TOKENS,
    VALUE_START,
    Packed,
    blocks,
    value_planes,
)
from rdkv.kernels.tail import Tail

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton, or its interpreter, is
VALUE_WIDTHS = torch.tensor([0, 2, 4, 8, 16], dtype=torch.uint8)
KEY_WIDTHS = torch.tensor([0, 2, 4, 6, 8, 16], dtype=torch.uint8)


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
    value_bits = VALUE_WIDTHS[torch.randint(5, (batch, heads, tokens))]
    key_bits = KEY_WIDTHS[torch.randint(6, (batch, heads, dim))]
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


def read_keys(packed: Packed, row: int, unused: bool = False) -> Tensor:
    """Key codes ``[n, D]`` of one row, read as `Packed` says where they are; ``unused``: of all slots of its blocks."""
    counts, starts = packed.host_counts[row], packed.starts[row].tolist()
    slots = _slots(counts[TOKENS], unused)
    columns, nibbles = counts[COLUMNS], counts[NIBBLES]
    words = packed.key_codes[starts[KEY_START] :].tolist()
    codes = torch.zeros(slots, packed.dim, dtype=torch.int64)
    for place, entry in enumerate(packed.key_columns[starts[COLUMN_START] :][: columns - nibbles].tolist()):
        for slot in range(slots if entry >= 0 else 0):
            octet, lane = divmod(slot, 8)
            if place < nibbles:
                digit = words[octet * columns + lane // 4 * nibbles + place] >> 4 * (lane % 4) & 15
            else:
                digit = words[octet * columns + nibbles + place] >> _PAIR_SHIFTS[lane] & 3
            codes[slot, entry & (1 << CHANNEL_BITS) - 1] += digit << 2 * (entry >> CHANNEL_BITS)
    return codes


def read_values(packed: Packed, row: int, unused: bool = False) -> Tensor:
    """Value codes ``[n, D]`` of one row, likewise."""
    counts, at, dim = packed.host_counts[row], int(packed.starts[row, VALUE_START]), packed.dim
    words, slots = packed.value_codes.tolist(), _slots(counts[TOKENS], unused)
    codes = torch.zeros(slots, dim, dtype=torch.int64)
    for plane in value_planes(counts):
        for slot in range(plane.first * 16, min(plane.end * 16, slots)):
            block, octet, lane = slot // 16 - plane.first, slot // 8 % 2, slot % 8
            for channel in range(dim):
                if plane.bits == 4:
                    word = words[at + ((block * 2 + lane // 4) * dim + channel) * 2 + octet]
                    digit = word >> 4 * (lane % 4) & 15
                else:
                    digit = words[at + (block * dim + channel) * 2 + octet] >> _PAIR_SHIFTS[lane] & 3
                codes[slot, channel] += digit << plane.shift
        at += plane.words(dim)
    return codes


_PAIR_SHIFTS = (0, 4, 2, 6, 8, 12, 10, 14)  # of the digits of slots 0 to 7 in a word of 2-bit digits


def _slots(tokens: int, unused: bool) -> int:
    return blocks(tokens) * 16 if unused else tokens
