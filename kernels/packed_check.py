"""Whether a `Packed` that comes from outside, such as a file, can be read without leaving its tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .packed import (
    BLOCK,
    CHANNEL_BITS,
    CODED16,
    COLUMNS,
    KEY_EXPONENT,
    NIBBLES,
    NOT_FINITE,
    PINNED,
    PINNED_START,
    TOKENS,
    VALUE_EXPONENT,
    Packed,
    layout,
    row_sizes,
)

MOST_CHANNELS = 1 << CHANNEL_BITS
PADDING = -1  # of key columns
STORED = (torch.float16, torch.bfloat16, torch.float32)  # float32 where nothing was to be compressed


def check(packed: Packed) -> None:
    """Raise unless whatever decoding reads of ``packed``, by its counts and starts, lies within its tensors.

    What codes and scales say is not judged: any bits are some number. Waits for the device.

    Raises:
        ValueError: what is wrong, and in which row or tensor.
    """
    rows, dim = packed.batch * packed.heads, packed.dim
    if min(packed.batch, packed.heads, dim) < 1 or dim > MOST_CHANNELS:
        raise ValueError(f"{packed.batch} sequences of {packed.heads} heads of {dim} channels")
    if not len(packed.host_counts) == len(packed.raw) == rows:
        raise ValueError(f"{len(packed.host_counts)} rows of counts and {len(packed.raw)} of raw for {rows} rows")
    for row, (counts, raw) in enumerate(zip(packed.host_counts, packed.raw, strict=True)):
        _check_counts(counts, raw, dim, f"row {row}")
    _check_tensors(packed, rows)
    _check_starts(packed)
    _check_contents(packed)


def _check_counts(counts: Sequence[int], raw: int, dim: int, where: str) -> None:
    if len(counts) != KEY_EXPONENT:
        raise ValueError(f"{where}: {len(counts)} counts, not {KEY_EXPONENT}")
    coded = counts[: CODED16 + 1]
    if min(counts) < 0 or list(coded) != sorted(coded, reverse=True):
        raise ValueError(f"{where}: counts {list(counts)} are negative, or rise from one width to the next")
    sizes, words = row_sizes(counts, dim), (counts[COLUMNS], counts[NIBBLES])
    if any(count % BLOCK for count in words) or (any(words) and not counts[TOKENS]):
        raise ValueError(f"{where}: key columns {list(words)} for {counts[TOKENS]} tokens")
    if min(sizes) < 0 or 2 * counts[NIBBLES] > counts[COLUMNS]:  # each takes two words
        raise ValueError(f"{where}: counts {list(counts)} contradict each other")
    if not 0 <= raw <= counts[PINNED]:
        raise ValueError(f"{where}: {raw} of {counts[PINNED]} pinned tokens are raw")


def _flat(packed: Packed) -> tuple[Tensor, ...]:
    """The flat tensors in the order of `Packed.starts`."""
    return packed.key_codes, packed.value_codes, packed.key_columns, packed.value_affine, packed.pinned_keys


def _check_tensors(packed: Packed, rows: int) -> None:
    _, (keys, values, columns, affine, pinned) = layout(packed.host_counts, packed.dim)
    stored = packed.pinned_keys.dtype
    expected = {
        "key_codes": ((keys,), torch.int16),
        "key_columns": ((columns,), torch.int16),
        "key_affine": ((rows, packed.dim, 2), torch.float16),
        "value_codes": ((values,), torch.int16),
        "value_affine": ((affine, 2), torch.float16),
        "pinned_keys": ((pinned, packed.dim), stored),
        "pinned_values": ((pinned, packed.dim), stored),
        "counts": ((rows, VALUE_EXPONENT + 1), torch.int32),
        "starts": ((rows, PINNED_START + 1), torch.int64),
    }
    if stored not in STORED:
        raise ValueError(f"pinned_keys are {stored}")
    for name, (shape, dtype) in expected.items():
        tensor: Tensor = getattr(packed, name)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}, not {list(shape)} {dtype} as counts say")
        if not tensor.is_contiguous() or tensor.device != packed.counts.device:
            raise ValueError(f"{name} is not contiguous, or not where counts are")


def _check_starts(packed: Packed) -> None:
    ends = [tensor.shape[0] for tensor in _flat(packed)]
    for row, (starts, counts) in enumerate(zip(packed.starts.tolist(), packed.host_counts, strict=True)):
        for start, size, end in zip(starts, row_sizes(counts, packed.dim), ends, strict=True):
            if not 0 <= start <= end - size:
                raise ValueError(f"row {row}: {size} elements from {start} on do not lie within {end}")


def _check_contents(packed: Packed) -> None:
    counts = packed.counts.tolist()
    if tuple(tuple(row[:KEY_EXPONENT]) for row in counts) != packed.host_counts:
        raise ValueError("counts differ from their copy on the host")
    if any(abs(exponent) >= NOT_FINITE for row in counts for exponent in row[KEY_EXPONENT:]):
        raise ValueError("counts have an exponent that no scale has")
    columns = packed.key_columns
    # 3 bits are left for the digit's place, all of which there are.
    named = (columns >= 0) & ((columns & MOST_CHANNELS - 1) < packed.dim)
    if not bool((named | (columns == PADDING)).all()):
        raise ValueError(f"key_columns name a channel beyond {packed.dim}")
