"""The packed form of one layer's keys and values: what the packers write and the decode kernels read.

``R = batch * heads`` rows, each one KV head of one sequence; ``D`` channels. Tokens of a row are either pinned
(16-bit key and value, exact) or coded: these have quantised keys and values and stand in slots ``0 .. n - 1`` by
the width of their value in the order 16, 8, 4, 2, and by position within a width. Slots come in blocks of 16; codes
of the unused ones are 0.

Codes are stored as digits, of 4 bits (*nibbles*) where there are enough and of 2 bits elsewhere, in 16-bit words.
Of nibbles an octet of slots takes two words, the first those of slots ``8 * i .. 8 * i + 3``, bits ``4j .. 4j + 3``
that of slot ``8 * i + j``, the second those of the next four. Of 2-bit digits word ``i`` holds those of slots
``8 * i .. 8 * i + 7``, that of slot ``8 * i + j`` from bit ``PAIR_SHIFTS[j]`` on: a mask finds the digits of odd slots
4 bits above those of even ones, as among nibbles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

PAIR_SHIFTS = (0, 4, 2, 6, 8, 12, 10, 14)  # where the 2-bit digits of eight slots stand in a word
CHANNEL_BITS = 12  # of an entry of `Packed.key_columns`, for the channel
BLOCK = 16  # slots and key columns come in multiples of this
# Columns of `Packed.counts`: coded tokens; those whose value has at least 4, 8, 16 bits; pinned tokens; words of an
# octet's keys; nibbles of a key; exponents of the largest key and value scale of a digit.
TOKENS, CODED4, CODED8, CODED16, PINNED, COLUMNS, NIBBLES, KEY_EXPONENT, VALUE_EXPONENT = range(9)
# Columns of `Packed.starts`.
KEY_START, VALUE_START, COLUMN_START, VALUE_AFFINE_START, PINNED_START = range(5)

# Exponent that the packers use for a scale that does not exist; no `Packed` has it.
NOT_FINITE = 1024

HostCounts = tuple[tuple[int, ...], ...]


class NotFiniteError(ValueError):
    """Keys or values that no scale covers: not finite, or beyond the range of float16."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} are not finite or exceed the range of float16 (65504), so that they have no scale; "
            "is the model's output finite?"
        )


@dataclass(frozen=True, eq=False)
class Packed:
    """One layer of ``batch`` sequences, packed. Rows follow one another in the flat tensors.

    Attributes:
        batch, heads, dim: sizes; ``R = batch * heads``, ``D = dim``.
        span: coded values are under a rotation of so many channels (`naive_rotation`), 1 for none.
        host_counts: for each row its columns ``TOKENS`` to ``NIBBLES`` of ``counts``, on the host.
        raw: for each row, how many of its pinned tokens are so only because all of the row's widths, of values
            and of keys, are 16 (for such a row the quantiser would cost bytes and gain nothing).
        key_codes: int16, row ``[2 * ceil(n / 16), C]`` words, ``C = 2 * A + S``: of each octet of slots the first
            words of ``A`` nibbles, the second words of the same, and ``S`` words of 2-bit digits; ``A`` and ``S`` are
            multiples of 16. Digits of 4 bits, in order of weight, then channel, are nibbles but for the last ones
            that fill no 16. 2-bit digits are the channels of 2 bits, then of each digit left over its lower and its
            upper half, then zeros.
        key_columns: int16, row ``[A + S]``: ``channel | shift / 2 << CHANNEL_BITS`` for a digit that stands ``shift``
            bits up in its code, -1 for padding; nothing if ``n = 0``, and then ``C = A = 0``.
        key_affine: ``[R, D, 2]`` float16, scale and zero: ``key = zero + scale * code``. Channels of 0 bits:
            scale 0, zero the mean over the coded tokens. Rows without coded tokens: zeros.
        value_codes: int16, row: for each plane of `value_planes` its blocks, of nibbles ``[2, D, 2]`` words (first or
            second word; channel; octet), of 2-bit digits ``[D, 2]``.
        value_affine: ``[sum n, 2]`` float16, scale and zero of each slot.
        pinned_keys, pinned_values: ``[sum p, D]`` storage type, in order of position.
        counts: ``[R, 9]`` int32. The exponents keep products within float16: the least ``e`` such that no scale
            times ``2 ** (b - 2)``, for a width of ``b`` bits, exceeds ``2 ** e``; 0 where there is no scale but 0.
        starts: ``[R, 5]`` int64, where a row starts: in elements of ``key_codes``, ``value_codes`` and
            ``key_columns``, in rows of ``value_affine`` and ``pinned_*``.
    """

    batch: int
    heads: int
    dim: int
    span: int
    host_counts: HostCounts
    raw: tuple[int, ...]
    key_codes: Tensor
    key_columns: Tensor
    key_affine: Tensor
    value_codes: Tensor
    value_affine: Tensor
    pinned_keys: Tensor
    pinned_values: Tensor
    counts: Tensor
    starts: Tensor

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held."""
        yield from (self.key_codes, self.key_columns, self.key_affine, self.value_codes, self.value_affine)
        yield from (self.pinned_keys, self.pinned_values, self.counts, self.starts)

    @property
    def slots(self) -> int:
        """Most tokens of any row, pinned ones included."""
        return max((row[TOKENS] + row[PINNED] for row in self.host_counts), default=0)


def blocks(slots: int) -> int:
    """Blocks that hold this many slots."""
    return -(-slots // BLOCK)


@dataclass(frozen=True)
class ValuePlane:
    """Digits of ``bits`` bits, ``shift`` bits up in their codes, of the slots in blocks ``first`` to ``end``."""

    bits: int
    shift: int
    first: int
    end: int

    def words(self, dim: int) -> int:
        """Words that it takes."""
        return (self.end - self.first) * self.bits * dim


def value_planes(counts: Sequence[int]) -> tuple[ValuePlane, ...]:
    """How a row's values are stored: nibbles where some value of a block has 4 bits, one 2-bit digit elsewhere."""
    n, n4, n8, n16 = (blocks(count) for count in counts[: CODED16 + 1])
    nibbles = tuple(ValuePlane(4, 4 * i, 0, end) for i, end in enumerate((n4, n8, n16, n16)))
    return (*nibbles, ValuePlane(2, 0, n4, n))


def key_places(counts: Sequence[int]) -> int:
    """Columns of a row's keys: nibbles, each of two words an octet, and 2-bit digits."""
    return counts[COLUMNS] - counts[NIBBLES]


def row_sizes(counts: Sequence[int], dim: int) -> tuple[int, ...]:
    """What a row takes of each flat tensor, in the units and the order of `Packed.starts`."""
    n, pinned = counts[TOKENS], counts[PINNED]
    values = sum(plane.words(dim) for plane in value_planes(counts))
    return 2 * blocks(n) * counts[COLUMNS], values, key_places(counts), n, pinned


def layout(counts: HostCounts, dim: int) -> tuple[list[list[int]], list[int]]:
    """Where each row starts, ``R`` lists in the order of `Packed.starts`, and the sizes of the flat tensors."""
    starts, at = [], [0] * (PINNED_START + 1)
    for row in counts:
        starts.append(at)
        at = [a + size for a, size in zip(at, row_sizes(row, dim), strict=True)]
    return starts, at


def unquantised(keys: Tensor, values: Tensor) -> Packed:
    """Keys and values ``[B, H, T, D]`` as pinned tokens alone, in their type."""
    batch, heads, tokens, dim = keys.shape
    rows, new = batch * heads, partial(torch.empty, device=keys.device)
    counts = torch.zeros(rows, VALUE_EXPONENT + 1, dtype=torch.int32, device=keys.device)
    counts[:, PINNED] = tokens
    starts = torch.zeros(rows, PINNED_START + 1, dtype=torch.int64, device=keys.device)
    starts[:, PINNED_START] = tokens * torch.arange(rows, device=keys.device)
    return Packed(
        batch=batch,
        heads=heads,
        dim=dim,
        span=1,  # nothing is coded
        host_counts=((*(0,) * PINNED, tokens, *(0,) * (NIBBLES - PINNED)),) * rows,
        raw=(tokens,) * rows,
        key_codes=new(0, dtype=torch.int16),
        key_columns=new(0, dtype=torch.int16),
        key_affine=torch.zeros(rows, dim, 2, dtype=torch.float16, device=keys.device),
        value_codes=new(0, dtype=torch.int16),
        value_affine=new(0, 2, dtype=torch.float16),
        pinned_keys=keys.reshape(-1, dim),
        pinned_values=values.reshape(-1, dim),
        counts=counts,
        starts=starts,
    )


def join(parts: Sequence[Packed], order: Sequence[int]) -> Packed:
    """Several of equal heads and dimension as one.

    Args:
        parts: one or more.
        order: sequence ``i`` of the result is sequence ``order[i]`` of the parts one after the other.

    Raises:
        ValueError: parts of unlike shape or storage type, or an order that is no permutation.
    """
    heads, dim = parts[0].heads, parts[0].dim
    kinds = {(p.heads, p.dim, p.span, p.pinned_keys.dtype) for p in parts}
    if len(kinds) > 1:
        raise ValueError(f"join: parts differ in (heads, dim, span, storage type): {sorted(map(str, kinds))}")
    if sorted(order) != list(range(sum(p.batch for p in parts))):
        raise ValueError(f"join: {list(order)} does not name each of the parts' sequences once")
    rows = [sequence * heads + head for sequence in order for head in range(heads)]
    at, shifted = [0] * (PINNED_START + 1), []
    for part in parts:
        shifted.append(part.starts + torch.tensor(at, device=part.starts.device))
        flat = (part.key_codes, part.value_codes, part.key_columns, part.value_affine, part.pinned_keys)
        at = [a + t.shape[0] for a, t in zip(at, flat, strict=True)]
    index = torch.tensor(rows, device=parts[0].counts.device)
    host = [row for part in parts for row in part.host_counts]
    raw = [count for part in parts for count in part.raw]
    return Packed(
        batch=len(order),
        heads=heads,
        dim=dim,
        span=parts[0].span,
        host_counts=tuple(host[r] for r in rows),
        raw=tuple(raw[r] for r in rows),
        key_codes=torch.cat([p.key_codes for p in parts]),
        key_columns=torch.cat([p.key_columns for p in parts]),
        key_affine=torch.cat([p.key_affine for p in parts])[index],
        value_codes=torch.cat([p.value_codes for p in parts]),
        value_affine=torch.cat([p.value_affine for p in parts]),
        pinned_keys=torch.cat([p.pinned_keys for p in parts]),
        pinned_values=torch.cat([p.pinned_values for p in parts]),
        counts=torch.cat([p.counts for p in parts])[index],
        starts=torch.cat(shifted)[index],
    )


def split(packed: Packed, sequences: Sequence[int]) -> Packed:
    """Some sequences of ``packed`` as a prompt of their own, which shares nothing with it: the reverse of `join`."""
    rows = [sequence * packed.heads + head for sequence in sequences for head in range(packed.heads)]
    host = tuple(packed.host_counts[row] for row in rows)
    starts, _ = layout(host, packed.dim)
    every = packed.starts.tolist()
    spans = [
        [slice(start, start + size) for start, size in zip(every[row], row_sizes(counts, packed.dim), strict=True)]
        for row, counts in zip(rows, host, strict=True)
    ]

    def cut(flat: Tensor, column: int) -> Tensor:
        return torch.cat([flat[span[column]] for span in spans])

    index = torch.tensor(rows, device=packed.counts.device)
    return Packed(
        batch=len(sequences),
        heads=packed.heads,
        dim=packed.dim,
        span=packed.span,
        host_counts=host,
        raw=tuple(packed.raw[row] for row in rows),
        key_codes=cut(packed.key_codes, KEY_START),
        key_columns=cut(packed.key_columns, COLUMN_START),
        key_affine=packed.key_affine[index],
        value_codes=cut(packed.value_codes, VALUE_START),
        value_affine=cut(packed.value_affine, VALUE_AFFINE_START),
        pinned_keys=cut(packed.pinned_keys, PINNED_START),
        pinned_values=cut(packed.pinned_values, PINNED_START),
        counts=packed.counts[index],
        starts=torch.tensor(starts, dtype=torch.int64, device=packed.starts.device),
    )
