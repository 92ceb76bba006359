"""The packed prompt of the ``mixed-bit`` format: bit-packed codes, ragged per head, nothing padded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import naive
from ...runtime.errors import ConfigError
from ...runtime.interfaces import PackedSegment
from ...runtime.plan import BitPlan

WIDTHS = (0, 2, 4, 8, 16)
CODED = (2, 4, 8)  # widths that pass through the quantiser
VALUE_CLASSES = (16, 8, 4, 2)  # order of a head's coded tokens; pinned tokens stand before them


@dataclass(frozen=True)
class Shape:
    """Host-side shape of a segment: ``R = batch * heads`` rows, each one head of one sequence."""

    batch: int
    heads: int
    tokens: int
    dim: int
    slots: int  # most kept tokens of any row
    coded: int  # most coded (kept, not pinned) tokens of any row
    channels: tuple[int, ...]  # key codes of each width in CODED, over all rows


@dataclass(frozen=True)
class Positions:
    """Which prompt positions a segment holds, for `MixedBitSegment.plan`; decoding does not need it."""

    kept: Tensor  # [R, ceil(T / 8)] uint8, one bit a token, pinned tokens left out
    classes: Tensor  # [ceil(sum M / 4)] uint8, 2 bits a coded token in order of position
    pinned: Tensor  # [sum P] int32


@dataclass(frozen=True)
class MixedBitSegment(PackedSegment):
    """One layer's prompt at the bits of its plan.

    Rows are flattened in order; each row's tokens stand pinned first, then by falling width, in order
    of position within a width. Keys of coded tokens are quantised per channel over those tokens, values
    per token over the channels; both asymmetric uniform with float16 scale and zero point.

    Attributes:
        shape: sizes that kernels need on the host.
        counts: ``[R, 5]`` int32, tokens of each row: pinned, then at 16, 8, 4 and 2 bits.
        key_widths: ``[R, ceil(D / 2)]`` uint8, two 4-bit indices into ``WIDTHS`` a byte; empty rows: 0.
        pinned_keys, pinned_values: ``[sum P, D]`` 16-bit floats.
        values: for each width of ``VALUE_CLASSES`` ``[n, D]`` floats or ``[n, ceil(D * bits / 8)]`` codes.
        value_affine: for each width below 16 ``[n, 2]`` float16, scale and zero point.
        keys: for each width of ``CODED`` its codes ``[ceil(codes * bits / 8)]`` uint8, row by row,
            token by token, channels ascending; then the 16-bit channels in the same order.
        key_affine: ``[coded channels, 2]`` float16, row by row, channels ascending.
        key_mean: ``[0-bit channels]`` 16-bit floats, row by row.
        positions: None if they were not kept.
    """

    shape: Shape
    counts: Tensor
    key_widths: Tensor
    pinned_keys: Tensor
    pinned_values: Tensor
    values: tuple[Tensor, ...]
    value_affine: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    key_affine: Tensor
    key_mean: Tensor
    positions: Positions | None

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.counts, self.key_widths, self.pinned_keys, self.pinned_values, self.key_affine, self.key_mean)
        yield from (*self.values, *self.value_affine, *self.keys)
        if self.positions is not None:
            yield from (self.positions.kept, self.positions.classes, self.positions.pinned)

    def attend(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        keys, values, held = self.unpack()
        return naive.attention(query, keys, values, scale, held.unsqueeze(2))

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        shape = self.shape
        rows, device = shape.batch * shape.heads, self.counts.device
        counts = self.counts.long()
        starts = counts.cumsum(1) - counts  # [R, 5] first slot of each class
        keys = torch.zeros(rows, shape.slots, shape.dim, device=device)
        values = torch.zeros_like(keys)
        at = _slots(starts[:, 0], counts[:, 0])
        keys[at], values[at] = self.pinned_keys.float(), self.pinned_values.float()
        for index, bits in enumerate(VALUE_CLASSES):
            values[_slots(starts[:, index + 1], counts[:, index + 1])] = self._value_class(index, bits)
        coded = counts[:, 1:].sum(1)
        at = _slots(counts[:, 0], coded)
        valid = torch.arange(shape.coded, device=device) < coded[:, None]  # [R, M]
        keys[at] = self._coded_keys(valid)[valid]
        held = torch.arange(shape.slots, device=device) < counts.sum(1, keepdim=True)
        view = (shape.batch, shape.heads)
        return keys.unflatten(0, view), values.unflatten(0, view), held.unflatten(0, view)

    def _value_class(self, index: int, bits: int) -> Tensor:
        """Values of one width, ``[n, D]`` float32."""
        if bits == 16:
            return self.values[index].float()
        codes = naive.unpack_bits(self.values[index], bits, self.shape.dim)
        scale, zero = self.value_affine[index - 1].unbind(1)
        return naive.dequantize(codes, scale[:, None], zero[:, None])

    def key_bits(self) -> Tensor:
        """Width of each key channel, ``[R, D]`` uint8."""
        table = torch.tensor(WIDTHS, dtype=torch.uint8, device=self.key_widths.device)
        return table[naive.unpack_bits(self.key_widths, 4, self.shape.dim).long()]

    def _coded_keys(self, valid: Tensor) -> Tensor:
        """Keys of the coded tokens, ``[R, M, D]`` float32; ``valid`` ``[R, M]`` marks the slots in use."""
        bits = self.key_bits()
        occupied = valid.any(1, keepdim=True)  # rows without coded tokens hold no channel metadata
        scale = torch.zeros(bits.shape, device=bits.device)
        zero = torch.zeros_like(scale)
        coded = (bits > 0) & (bits < 16) & occupied
        scale[coded], zero[coded] = self.key_affine.float().unbind(1)
        zero[(bits == 0) & occupied] = self.key_mean.float()
        keys = torch.zeros((*valid.shape, self.shape.dim), device=bits.device)
        for index, width in enumerate((*CODED, 16)):
            at = valid.unsqueeze(2) & (bits == width).unsqueeze(1)
            if width == 16:
                keys[at] = self.keys[index].float()
            else:
                keys[at] = naive.unpack_bits(self.keys[index], width, self.shape.channels[index]).float()
        raw = (bits == 16).unsqueeze(1)
        return torch.where(raw, keys, keys * scale.unsqueeze(1) + zero.unsqueeze(1))

    def plan(self) -> BitPlan:
        if self.positions is None:
            raise ConfigError("the plan was not kept: set the format option positions=true")
        shape = self.shape
        counts = self.counts.long()
        kept = naive.unpack_bits(self.positions.kept, 1, shape.tokens).bool()  # [R, T]
        table = torch.tensor(VALUE_CLASSES, dtype=torch.uint8, device=kept.device)
        value_bits = torch.zeros(kept.shape, dtype=torch.uint8, device=kept.device)
        value_bits[kept] = table[naive.unpack_bits(self.positions.classes, 2, int(counts[:, 1:].sum())).long()]
        pinned = torch.zeros_like(kept)
        rows = torch.arange(kept.shape[0], device=kept.device).repeat_interleave(counts[:, 0])
        pinned[rows, self.positions.pinned.long()] = True
        value_bits[pinned] = 16
        view = (shape.batch, shape.heads)
        return BitPlan(value_bits.unflatten(0, view), self.key_bits().unflatten(0, view), pinned.unflatten(0, view))


def _slots(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Row and slot of each of ``count[r]`` tokens that stand from ``start[r]`` on, row by row."""
    rows = torch.arange(count.shape[0], device=count.device).repeat_interleave(count)
    first = (count.cumsum(0) - count)[rows]
    return rows, torch.arange(rows.shape[0], device=count.device) - first + start[rows]
