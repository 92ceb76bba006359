"""Packing on the GPU: seven launches around one read of the counts, which say how large the result is.

`begin` sends for the counts, `Begun.finish` reads them: whoever gives the device something else to do in between
does not let it run dry.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import naive_rotation, rotation
from . import pack_measure_kernels as measuring
from . import pack_write_kernels as writing
from .packed import (
    CODED16,
    KEY_EXPONENT,
    NIBBLES,
    NOT_FINITE,
    PINNED,
    TOKENS,
    VALUE_EXPONENT,
    NotFiniteError,
    Packed,
    blocks,
    layout,
)
from .transfer import Readback, send

SPAN = 1024  # tokens of one program that lists them
CHUNK = 128  # slots of one program that measures
TILE = 4096  # numbers in a tile


@dataclass(frozen=True)
class _Input:
    """What is to be packed: floats ``[B, H, T, D]``, plan ``[R, T]``, ``[R, D]`` and ``[R, T]``, as bytes.

    ``rotated`` are the values as they are quantised (`rotation`), over ``span`` channels.
    """

    keys: Tensor
    values: Tensor
    rotated: Tensor
    span: int
    value_bits: Tensor
    key_bits: Tensor
    pinned: Tensor

    @property
    def rows(self) -> int:
        return self.keys.shape[0] * self.keys.shape[1]

    @property
    def tile(self) -> dict[str, int]:
        """Compile-time sizes of every kernel that reads floats."""
        heads, dim = self.keys.shape[1], self.keys.shape[3]
        return {"H": heads, "D": dim, "DP": max(16, triton.next_power_of_2(dim))}


@dataclass(frozen=True)
class _Tables:
    """What is known before the sizes are: see the kernels."""

    report: Tensor
    token: Tensor
    affine: Tensor
    key_affine: Tensor
    place: Tensor


@dataclass(frozen=True)
class Begun:
    """What is measured and not yet packed; ``report`` is on its way to the host."""

    given: _Input
    tables: _Tables
    report: Readback

    def finish(self) -> Packed:
        """The packed form; the device is waited for until it has measured, not for what it was given after that.

        Raises:
            NotFiniteError: what is to be quantised is not finite, or exceeds float16.
        """
        report = self.report.read()
        for column, what in ((KEY_EXPONENT, "keys"), (VALUE_EXPONENT, "values")):
            if any(row[column] == NOT_FINITE for row in report):
                raise NotFiniteError(what)
        with torch.cuda.device_of(self.given.keys):  # type: ignore[no-untyped-call]
            packed = _allocate(self.given, self.tables, report)
            _write(self.given, self.tables, packed)
        return packed


def pack(
    keys: Tensor, values: Tensor, value_bits: Tensor, key_bits: Tensor, pinned: Tensor, rotate: bool = True
) -> Packed:
    """`naive_pack.pack`, bit for bit.

    Raises:
        NotFiniteError: what is to be quantised is not finite, or exceeds float16.
    """
    return begin(keys, values, value_bits, key_bits, pinned, rotate).finish()


def begin(
    keys: Tensor, values: Tensor, value_bits: Tensor, key_bits: Tensor, pinned: Tensor, rotate: bool = True
) -> Begun:
    """The first half of `pack`, which waits for nothing; finish it on the same stream."""
    keys, values = (t if t.stride(3) == 1 else t.contiguous() for t in (keys, values))
    rows = keys.shape[0] * keys.shape[1]
    plan = (t.reshape(rows, -1).contiguous().view(torch.uint8) for t in (value_bits, key_bits, pinned))
    with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call]
        span = naive_rotation.span(keys.shape[3]) if rotate else 1
        given = _Input(keys, values, rotation.rotate(values, span), span, *plan)
        tables = _measure(given)
        return Begun(given, tables, Readback(tables.report))


def _measure(given: _Input) -> _Tables:
    keys, values, tile, rows = given.keys, given.rotated, given.tile, given.rows
    tokens, dim = keys.shape[2:]
    spans, chunks = max(1, -(-tokens // SPAN)), max(1, -(-tokens // CHUNK))
    padded = {"D": dim, "DP": tile["DP"]}

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=keys.device)

    tables = _Tables(
        report=new(rows, measuring.REPORT),
        token=new(rows, tokens),
        affine=new(rows, tokens, 2, dtype=torch.float16),
        key_affine=new(rows, dim, 2, dtype=torch.float16),
        place=new(rows, 4, tile["DP"]),
    )
    tally = new(rows, spans, measuring.KINDS)
    measuring.tally_kernel[spans, rows](given.value_bits, given.pinned, tally, tokens, SPAN=SPAN)
    measuring.slots_kernel[spans, rows](
        given.value_bits, given.key_bits, given.pinned, tally, tables.report, tables.token, tokens,
        **padded, SPAN=SPAN, BS=128,
    )  # fmt: skip
    low, high = new(2, rows, chunks, dim, dtype=torch.float32)
    parts = (new(rows, chunks, dtype=torch.float32), low, high, new(rows, chunks, dim, dtype=torch.float64))
    measuring.measure_kernel[chunks, rows](
        keys, *keys.stride()[:3], values, *values.stride()[:3], tables.report, tables.token, *parts, tables.affine,
        tokens, **tile, BT=min(CHUNK, TILE // tile["DP"]), CHUNK=CHUNK, NARROW=given.span > 1,
    )  # fmt: skip
    measuring.tables_kernel[rows,](
        given.key_bits, tables.report, *parts, tables.key_affine, tables.place, chunks,
        **padded, BC=TILE // tile["DP"], CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
    return tables


def _allocate(given: _Input, tables: _Tables, report: list[list[int]]) -> Packed:
    """Everything but what the last three kernels write."""
    keys = given.keys
    batch, heads, _, dim = keys.shape
    counts = tuple(tuple(row[: NIBBLES + 1]) for row in report)
    starts, sizes = layout(counts, dim)

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=keys.device)

    key_codes, value_codes, columns, affine, pinned = sizes
    return Packed(
        batch=batch,
        heads=heads,
        dim=dim,
        span=given.span,
        host_counts=counts,
        raw=tuple(row[-1] for row in report),
        key_codes=new(key_codes, dtype=torch.int16),
        key_columns=new(columns, dtype=torch.int16),
        key_affine=tables.key_affine,
        value_codes=new(value_codes, dtype=torch.int16),
        value_affine=new(affine, 2, dtype=torch.float16),
        pinned_keys=new(pinned, dim, dtype=keys.dtype),
        pinned_values=new(pinned, dim, dtype=keys.dtype),
        counts=tables.report[:, : VALUE_EXPONENT + 1].contiguous(),
        starts=send(torch.tensor(starts), keys.device),
    )


def _write(given: _Input, tables: _Tables, packed: Packed) -> None:
    keys, values, tile = given.keys, given.values, given.tile
    tokens, rows = keys.shape[2], given.rows
    where = (packed.counts, packed.starts, tables.token)
    most_coded, most_pinned = (max(row[i] for row in packed.host_counts) for i in (TOKENS, PINNED))
    if most_coded:
        words = max(2, 1024 // tile["DP"])
        writing.keys_kernel[-(-2 * blocks(most_coded) // words), rows](
            keys, *keys.stride()[:3], given.key_bits, *where, tables.key_affine, tables.place,
            packed.key_codes, packed.key_columns, tokens, **tile, W=words,
        )  # fmt: skip
        span = max(1, 256 // tile["DP"])
        halves = 1 + any(row[CODED16] for row in packed.host_counts)  # of a code
        writing.values_kernel[-(-blocks(most_coded) // span), rows, halves](
            given.rotated, *given.rotated.stride()[:3], *where, tables.affine,
            packed.value_codes.view(torch.int32), packed.value_affine, tokens, **tile, Q=span,
        )  # fmt: skip
    if most_pinned:
        span = TILE // tile["DP"]
        as_integers = torch.int16 if keys.element_size() == 2 else torch.int32
        data = (t.view(as_integers) for t in (packed.pinned_keys, packed.pinned_values))
        writing.pinned_kernel[-(-most_pinned // span), rows](
            keys.view(as_integers), *keys.stride()[:3], values.view(as_integers), *values.stride()[:3],
            *where, *data, tokens, **tile, BT=span,
        )  # fmt: skip
