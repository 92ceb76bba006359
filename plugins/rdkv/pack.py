"""Packing a layer's keys and values into a `MixedBitSegment`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import naive
from ...runtime.errors import PluginError
from ...runtime.plan import BitPlan
from .segment import CODED, VALUE_CLASSES, WIDTHS, MixedBitSegment, Positions, Shape


def pack(keys: Tensor, values: Tensor, plan: BitPlan, keep_positions: bool) -> MixedBitSegment:
    """Pack ``keys`` and ``values`` ``[B, H, T, D]`` at the widths of ``plan``."""
    batch, heads, tokens, dim = keys.shape
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)  # [R, T, D]
    pinned = plan.pinned.flatten(0, 1)
    bits = plan.value_bits.flatten(0, 1).masked_fill(pinned, 0)  # [R, T], pinned tokens apart
    of_class = [pinned, *(bits == width for width in VALUE_CLASSES)]
    counts = torch.stack([mask.sum(1) for mask in of_class], 1).int()  # [R, 5]
    total, of_codes = counts.sum(1), counts[:, 1:].sum(1)
    slots, coded, stored = torch.stack([total.amax(), of_codes.amax(), total.sum()]).tolist()
    packed_values, value_affine = _pack_values(values, of_class[1:])
    key_bits = plan.key_bits.flatten(0, 1) * (bits > 0).any(1, keepdim=True)  # empty rows hold no channels
    streams, channels, key_affine, key_mean = _pack_keys(_coded_keys(keys, bits, coded), key_bits, bits)
    return MixedBitSegment(
        shape=Shape(batch, heads, tokens, dim, slots, stored, channels),
        counts=counts,
        key_widths=_pack_widths(key_bits),
        pinned_keys=keys[pinned],
        pinned_values=values[pinned],
        values=packed_values,
        value_affine=value_affine,
        keys=streams,
        key_affine=key_affine,
        key_mean=key_mean,
        positions=_positions(bits, pinned) if keep_positions else None,
    )


def _affine(low: Tensor, high: Tensor, bits: int, what: str) -> tuple[Tensor, Tensor]:
    scale, zero = naive.affine_parameters(low, high, bits)
    _require_finite(scale.isfinite() & zero.isfinite(), what)
    return scale, zero


def _require_finite(finite: Tensor, what: str) -> None:
    if not bool(finite.all()):
        raise PluginError(
            f"{what} are not finite or exceed the range of float16 "
            f"({naive.FLOAT16_MAX:.0f}), so that they have no scale; is the model's output finite?"
        )


def _pack_values(values: Tensor, of_class: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Values of each width in ``VALUE_CLASSES``, and scale and zero point of those below 16."""
    packed, affine = [values[of_class[0]]], []
    for width, mask in zip(VALUE_CLASSES[1:], of_class[1:], strict=True):
        chosen = values[mask].float()  # [n, D]
        scale, zero = _affine(chosen.amin(1), chosen.amax(1), width, "values")
        codes = naive.quantize(chosen, scale[:, None], zero[:, None], width)
        packed.append(naive.pack_bits(codes, width))
        affine.append(torch.stack([scale, zero], 1))
    return tuple(packed), tuple(affine)


def _coded_keys(keys: Tensor, bits: Tensor, coded: int) -> Tensor:
    """Keys of the coded tokens by falling width, ``[R, M, D]`` (slots past a row's own are arbitrary)."""
    order = bits.sort(dim=1, descending=True, stable=True).indices[:, :coded]  # [R, M]
    return keys.gather(1, order.unsqueeze(2).expand(-1, -1, keys.shape[2]))


def _pack_keys(
    keys: Tensor, key_bits: Tensor, bits: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int, ...], Tensor, Tensor]:
    """Code streams of each width and the raw channels, codes in each stream, scales and zeros, means."""
    count = (bits > 0).sum(1, keepdim=True)  # [R, 1]
    valid = (torch.arange(keys.shape[1], device=keys.device) < count).unsqueeze(2)  # [R, M, 1]
    x = keys.float()
    low = x.masked_fill(~valid, float("inf")).amin(1) if keys.shape[1] else x.new_zeros(key_bits.shape)
    high = x.masked_fill(~valid, float("-inf")).amax(1) if keys.shape[1] else x.new_zeros(key_bits.shape)
    occupied = count > 0
    scale, zero = torch.zeros_like(low).half(), torch.zeros_like(low).half()
    streams, sizes = [], []
    for width in CODED:
        channel = (key_bits == width) & occupied  # [R, D]
        scale[channel], zero[channel] = _affine(low[channel], high[channel], width, "keys")
        codes = naive.quantize(x, scale.unsqueeze(1), zero.unsqueeze(1), width)[valid & channel.unsqueeze(1)]
        streams.append(naive.pack_bits(codes, width))
        sizes.append(codes.shape[0])
    streams.append(keys[valid & (key_bits == 16).unsqueeze(1)])
    coded = (key_bits > 0) & (key_bits < 16) & occupied
    mean = x.masked_fill(~valid, 0.0).sum(1) / count.clamp(min=1)
    key_mean = mean[(key_bits == 0) & occupied].to(keys.dtype)
    _require_finite(key_mean.isfinite(), "keys")
    return tuple(streams), tuple(sizes), torch.stack([scale[coded], zero[coded]], 1), key_mean


def _pack_widths(key_bits: Tensor) -> Tensor:
    return naive.pack_bits(_index_in(WIDTHS, key_bits), 4)


def _index_in(widths: tuple[int, ...], bits: Tensor) -> Tensor:
    """Place of each width of ``bits`` in ``widths``, uint8."""
    index = torch.zeros(256, dtype=torch.uint8, device=bits.device)
    index[list(widths)] = torch.arange(len(widths), dtype=torch.uint8, device=bits.device)
    return index[bits.long()]


def _positions(bits: Tensor, pinned: Tensor) -> Positions:
    kept = bits > 0
    return Positions(
        kept=naive.pack_bits(kept.to(torch.uint8), 1),
        classes=naive.pack_bits(_index_in(VALUE_CLASSES, bits[kept]), 2),
        pinned=pinned.nonzero()[:, 1].int(),
    )
