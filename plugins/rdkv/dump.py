"""Segments of the ``mixed-bit`` format as named tensors, and back from tensors that nobody vouches for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec
import torch
from torch import Tensor

from ...kernels import naive, naive_rotation
from ...kernels.packed import KEY_EXPONENT, PINNED, TOKENS, VALUE_EXPONENT, Packed, layout, split
from ...kernels.packed_check import STORED, check
from ...runtime.errors import ConfigError
from ...runtime.interfaces import PackedSegment
from .positions import Positions
from .segment import MixedBitSegment
from .whole import EmptySegment, WholeSegment

# ``starts`` is left out: a segment of its own is laid out in order of its rows.
PACKED = (
    "counts", "key_codes", "key_columns", "key_affine", "value_codes", "value_affine", "pinned_keys", "pinned_values",
)  # fmt: skip
POSITIONS = ("kept", "classes", "pinned")
LAYOUT = 2  # to be raised whenever the tensors of a `Packed` come to mean something else

Shape = tuple[int, int, int, int]


class SegmentHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the tensors of a segment do not say.

    Attributes:
        layout: what the tensors mean.
        kind: of the segment.
        raw: `Packed.raw`.
        span: `Packed.span`.
    """

    layout: int
    kind: Literal["packed", "whole", "empty"]
    raw: tuple[int, ...] = ()
    span: int = 1


def dump(segment: PackedSegment) -> tuple[dict[str, Tensor], SegmentHeader]:
    """Tensors and header of a segment; of one that shares its `Packed` with others, those of its own part."""
    if isinstance(segment, EmptySegment):
        return {}, SegmentHeader(LAYOUT, "empty")
    if isinstance(segment, WholeSegment):
        return {"keys": segment.keys, "values": segment.values}, SegmentHeader(LAYOUT, "whole")
    assert isinstance(segment, MixedBitSegment)
    rows = range(segment.packed.batch) if segment.rows is None else segment.rows
    packed = split(segment.packed, rows)
    tensors: dict[str, Tensor] = {name: getattr(packed, name) for name in PACKED}
    if segment.positions is not None:
        tensors |= {name: getattr(segment.positions, name) for name in POSITIONS}
    return tensors, SegmentHeader(LAYOUT, "packed", packed.raw, packed.span)


def load(tensors: Mapping[str, Tensor], header: SegmentHeader, shape: Shape, device: torch.device) -> PackedSegment:
    """The segment that `dump` took apart, of ``shape`` ``(B, H, T, D)``; everything that decoding relies on is checked.

    Raises:
        ConfigError: a layout of another version.
        ValueError: saying what cannot be.
    """
    if header.layout != LAYOUT:
        raise ConfigError(f"packed in layout {header.layout}, this rdkv reads {LAYOUT}; use the rdkv that packed it")
    names = {"empty": (), "whole": ("keys", "values"), "packed": PACKED}[header.kind]
    positions = POSITIONS if header.kind == "packed" and POSITIONS[0] in tensors else ()
    if tensors.keys() != {*names, *positions}:
        raise ValueError(f"a segment of kind {header.kind!r} has tensors {sorted(tensors)}, not {sorted(names)}")
    if header.kind == "empty":
        return EmptySegment(*shape, device)
    if header.kind == "whole":
        return _load_whole(tensors["keys"], tensors["values"], shape)
    packed = _load_packed(tensors, header, shape)
    if not positions:
        return MixedBitSegment(packed, shape[2], None)
    return MixedBitSegment(packed, shape[2], _load_positions(tensors, packed, shape[2]))


def _load_whole(keys: Tensor, values: Tensor, shape: Shape) -> WholeSegment:
    for name, tensor in (("keys", keys), ("values", values)):
        if tuple(tensor.shape) != shape or tensor.dtype not in STORED or tensor.dtype != keys.dtype:
            raise ValueError(f"{name} are {list(tensor.shape)} {tensor.dtype}, not {list(shape)} floats of one type")
    return WholeSegment(keys, values)


def _load_packed(tensors: Mapping[str, Tensor], header: SegmentHeader, shape: Shape) -> Packed:
    batch, heads, tokens, dim = shape
    counts = tensors["counts"]
    if counts.dtype != torch.int32 or tuple(counts.shape) != (batch * heads, VALUE_EXPONENT + 1):
        raise ValueError(f"counts are {list(counts.shape)} {counts.dtype}, for {batch} sequences of {heads} heads")
    host = tuple(tuple(row[:KEY_EXPONENT]) for row in counts.tolist())
    starts, _ = layout(host, dim)
    packed = Packed(
        batch=batch,
        heads=heads,
        dim=dim,
        span=header.span,
        host_counts=host,
        raw=header.raw,
        starts=torch.tensor(starts, dtype=torch.int64, device=counts.device),
        **{name: tensors[name] for name in PACKED},
    )
    check(packed)
    if header.span not in (1, naive_rotation.span(dim)):
        raise ValueError(f"values of {dim} channels are said to be rotated over {header.span}")
    if packed.slots > tokens:
        raise ValueError(f"a head holds {packed.slots} tokens of a prompt of {tokens}")
    return packed


def _load_positions(tensors: Mapping[str, Tensor], packed: Packed, tokens: int) -> Positions:
    positions = Positions(*(tensors[name] for name in POSITIONS))
    kept = [row[TOKENS] + raw for row, raw in zip(packed.host_counts, packed.raw, strict=True)]
    pinned = [row[PINNED] - raw for row, raw in zip(packed.host_counts, packed.raw, strict=True)]
    sizes = {"kept": (len(kept), -(-tokens // 8)), "classes": (-(-sum(kept) // 4),), "pinned": (sum(pinned),)}
    for name, dtype in zip(POSITIONS, (torch.uint8, torch.uint8, torch.int32), strict=True):
        tensor = tensors[name]
        if tuple(tensor.shape) != sizes[name] or tensor.dtype != dtype:
            raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}, not {list(sizes[name])} {dtype}")
    if naive.unpack_bits(positions.kept, 1, tokens).sum(1).tolist() != kept:
        raise ValueError("the positions are not those of as many tokens as are held")
    if not bool(((positions.pinned >= 0) & (positions.pinned < tokens)).all()):
        raise ValueError(f"a pinned token is not one of {tokens}")
    return positions
