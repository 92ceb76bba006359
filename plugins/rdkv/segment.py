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
    stored: int  # kept tokens of all rows
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
        per_row = counts.sum(1, keepdim=True)
        values = torch.zeros(rows * shape.slots, shape.dim, device=device)
        values[self._value_slots(counts)] = torch.cat([self.pinned_values.float(), *self._value_classes()])
        # Coded keys follow a row's pinned ones; slots past its last token hold whatever and are not held.
        slot = torch.arange(shape.slots, device=device)
        keys = self._coded_keys(counts, (slot - counts[:, :1]).clamp(min=0))  # [R, N, D]
        pinned = slot < counts[:, :1]
        if self.pinned_keys.shape[0]:
            order = (pinned.flatten().cumsum(0) - 1).clamp(min=0)  # stored row by row, as slots are
            keys = torch.where(pinned.unsqueeze(2), self.pinned_keys.float()[order].reshape(keys.shape), keys)
        view = (shape.batch, shape.heads, shape.slots)
        held = slot < per_row
        return keys.reshape(*view, shape.dim), values.reshape(*view, shape.dim), held.reshape(view)

    def _value_slots(self, counts: Tensor) -> Tensor:
        """Where each stored value goes in ``[R * N]``: pinned first, then class by class, row by row in each."""
        row = torch.arange(counts.shape[0], device=counts.device)[:, None]
        first = counts.cumsum(1) - counts + row * self.shape.slots
        size = counts.T.flatten()  # [5 * R], class by class
        start = (first.T.flatten() - size.cumsum(0) + size).repeat_interleave(size, output_size=self.shape.stored)
        return start + torch.arange(self.shape.stored, device=counts.device)

    def _value_classes(self) -> list[Tensor]:
        """Values of each width in ``VALUE_CLASSES``, ``[n, D]`` float32."""
        restored = [self.values[0].float()]
        for bits, packed, affine in zip(VALUE_CLASSES[1:], self.values[1:], self.value_affine, strict=True):
            scale, zero = affine[:, :1], affine[:, 1:]
            restored.append(naive.dequantize(naive.unpack_bits(packed, bits, self.shape.dim), scale, zero))
        return restored

    def key_bits(self) -> Tensor:
        """Width of each key channel, ``[R, D]`` uint8."""
        table = torch.tensor(WIDTHS, dtype=torch.uint8, device=self.key_widths.device)
        return table[naive.unpack_bits(self.key_widths, 4, self.shape.dim).long()]

    def _coded_keys(self, counts: Tensor, token: Tensor) -> Tensor:
        """Keys of the coded tokens numbered ``token`` ``[R, N]``, ``[R, N, D]`` float32; beyond a row's last: any."""
        width = naive.unpack_bits(self.key_widths, 4, self.shape.dim).long()  # [R, D] index into WIDTHS
        coded = counts[:, 1:].sum(1, keepdim=True)  # [R, 1]
        present = coded > 0  # rows without coded tokens hold no channel metadata
        scale, zero = self._key_affine(width, present)
        # A code's place: its stream, its row's start in the stream, its token, its rank among the channels.
        one_hot = torch.nn.functional.one_hot(width, len(WIDTHS))  # [R, D, 5]
        rank = one_hot.cumsum(1) - one_hot
        channels = one_hot.sum(1)  # [R, 5]
        size = channels * coded
        sizes = torch.tensor([0, *self.shape.channels, self.keys[-1].shape[0]], device=size.device)
        start = size.cumsum(0) - size + (sizes.cumsum(0) - sizes)  # [R, 5]
        place = start.gather(1, width) + rank.gather(2, width.unsqueeze(2)).squeeze(2)  # [R, D]
        stride = channels.gather(1, width)
        index = place.unsqueeze(1) + token.unsqueeze(2) * stride.unsqueeze(1)  # [R, N, D]
        streams = [
            naive.unpack_bits(packed, bits, count).float()
            for bits, packed, count in zip(CODED, self.keys, self.shape.channels, strict=False)
        ]
        codes = torch.cat([*streams, self.keys[-1].float(), token.new_zeros(1, dtype=torch.float32)])
        return codes[index.clamp(max=codes.shape[0] - 1)] * scale.unsqueeze(1) + zero.unsqueeze(1)

    def _key_affine(self, width: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every channel, ``[R, D]`` float32: 1 and 0 at 16 bits, 0 and the mean at 0."""
        coded = (width > 0) & (width < WIDTHS.index(16)) & present
        mean = (width == 0) & present
        table = torch.cat([self.key_affine.float(), self.key_affine.new_zeros(1, 2).float()])
        means = torch.cat([self.key_mean.float(), self.key_mean.new_zeros(1).float()])

        def nth(mask: Tensor, last: int) -> Tensor:
            """Position among the stored entries, the appended zero where there is none."""
            order = (mask.flatten().cumsum(0) - 1).reshape(mask.shape)
            return torch.where(mask, order, last)

        affine = table[nth(coded, table.shape[0] - 1)]  # [R, D, 2]
        raw = (width == WIDTHS.index(16)).float()
        return affine[..., 0] + raw, affine[..., 1] + means[nth(mean, means.shape[0] - 1)]

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
        view = (shape.batch, shape.heads, -1)
        return BitPlan(value_bits.reshape(view), self.key_bits().reshape(view), pinned.reshape(view))
