"""Packed prompts of random codes, in place of prompts of a hundred thousand tokens that would have to be packed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rdkv.kernels import naive_rotation
from rdkv.kernels.naive_pack import VALUE_ORDER, exponent, key_columns, to_words
from rdkv.kernels.packed import BLOCK, COLUMNS, NIBBLES, PINNED, TOKENS, Packed, blocks, layout, value_planes

from .sizes import Sizes

EXTENT = 6.0  # of what a quantiser covers: three standard deviations each way


def synthesize(batch: int, heads: int, sizes: Sizes, device: str, dtype: torch.dtype, seed: int = 0) -> Packed:
    """A `Packed` of these sizes with random codes, which stand for keys and values of about unit variance."""
    generator = torch.Generator(device).manual_seed(seed)
    dim, rows = len(sizes.key_widths[0]), batch * heads
    starts, total = layout(sizes.counts, dim)

    def words(count: int) -> Tensor:
        return torch.randint(-(1 << 15), 1 << 15, (count,), dtype=torch.int16, device=device, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    coded = torch.tensor([row[TOKENS] > 0 for row in sizes.counts], device=device).reshape(rows, 1, 1)
    widths = torch.tensor(sizes.key_widths, device=device)  # [R, D]
    zero = normal(rows, dim).float() - EXTENT / 2 * (widths > 0)
    key_affine = torch.stack([_scales(widths), zero], -1).masked_fill(~coded, 0.0)
    spans = torch.tensor([(n16, n8 - n16, n4 - n8, n - n4) for n, n4, n8, n16, *_ in sizes.counts], device=device)
    tokens = torch.tensor(VALUE_ORDER, device=device).repeat(rows).repeat_interleave(spans.flatten())  # [sum n]
    value_affine = torch.stack([_scales(tokens), torch.full(tokens.shape, -EXTENT / 2, device=device)], -1)
    counts = [(*row, *_exponents(row, w)) for row, w in zip(sizes.counts, sizes.key_widths, strict=True)]
    columns = [torch.cat(key_columns(w)) for row, w in zip(sizes.counts, widths.cpu(), strict=True) if row[TOKENS]]
    packed = Packed(
        batch=batch,
        heads=heads,
        dim=dim,
        span=naive_rotation.span(dim),
        host_counts=sizes.counts,
        raw=tuple(0 if row[TOKENS] else row[PINNED] for row in sizes.counts),
        key_codes=words(total[0]),
        key_columns=torch.cat([torch.zeros(0, dtype=torch.int16), *columns]).to(device),
        key_affine=key_affine.half(),
        value_codes=words(total[1]),
        value_affine=value_affine.half(),
        pinned_keys=normal(total[4], dim),
        pinned_values=normal(total[4], dim),
        counts=torch.tensor(counts, dtype=torch.int32, device=device),
        starts=torch.tensor(starts, device=device),
    )
    _clear_unused(packed, starts)
    return packed


def copy(packed: Packed) -> Packed:
    """The same in memory of its own."""
    fields = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
    clones: dict[str, Any] = {name: x.clone() for name, x in fields.items() if isinstance(x, Tensor)}
    return dataclasses.replace(packed, **clones)


def _scales(widths: Tensor) -> Tensor:
    """Scales at which the codes of each width cover `EXTENT`; 0 for width 0."""
    return torch.where(widths > 0, EXTENT / (2.0**widths - 1).clamp(min=1), 0.0)


def _exponents(counts: tuple[int, ...], key_widths: list[int]) -> tuple[int, int]:
    """Exponents of the largest key and value scale of a digit."""
    coded, *at_least = counts[:4]
    widths = [width for width, count in zip((4, 8, 16), at_least, strict=True) if count]
    keys = [width for width in set(key_widths) if width]

    def largest(found: list[int]) -> int:
        scales = _scales(torch.tensor(found)).half().tolist()
        return exponent(max((s * 4.0 ** (w // 2 - 1) for s, w in zip(scales, found, strict=True)), default=0.0))

    return (largest(keys), largest([2, *widths])) if coded else (0, 0)


def _clear_unused(packed: Packed, starts: list[list[int]]) -> None:
    """Codes of unused slots and of columns of padding, and what is above 2 bits in a nibble of a 2-bit value, are 0."""
    real = packed.key_columns >= 0
    for counts, (key_start, value_start, column_start, *_) in zip(packed.host_counts, starts, strict=True):
        if counts[TOKENS] == 0:
            continue
        columns, nibbles = counts[COLUMNS], 2 * counts[NIBBLES]
        keys = packed.key_codes[key_start:][: 2 * blocks(counts[TOKENS]) * columns].view(-1, columns)
        keys[:, nibbles:] *= real[column_start + nibbles // 2 :][: columns - nibbles]
        used = [16 if slot < counts[TOKENS] else 0 for slot in _last_block(blocks(counts[TOKENS]))]
        keys[-2:, :nibbles].unflatten(1, (2, counts[NIBBLES])).bitwise_and_(_mask(used, 4, 0, keys).view(2, 2, 1))
        keys[-2:, nibbles:].bitwise_and_(_mask(used, 2, 0, keys))
        at = value_start
        for plane in value_planes(counts):
            at += plane.words(packed.dim)
            if plane.end > plane.first:
                widths = [_value_width(slot, counts) for slot in _last_block(plane.end)]
                mask = _mask(widths, plane.bits, plane.shift, keys).view(2, -1, 1)  # octet, word
                last = packed.value_codes[at - plane.bits * packed.dim : at]
                last.view(-1, packed.dim, 2).bitwise_and_(mask.permute(1, 2, 0))


def _last_block(end: int) -> range:
    """Slots of the block before block ``end``."""
    return range((end - 1) * BLOCK, end * BLOCK)


def _value_width(slot: int, counts: tuple[int, ...]) -> int:
    """Width of the value in a slot, 0 for an unused one."""
    n, n4, n8, n16, *_ = counts
    return next((width for width, end in ((16, n16), (8, n8), (4, n4), (2, n)) if slot < end), 0)


def _mask(widths: list[int], bits: int, shift: int, like: Tensor) -> Tensor:
    """Words of a block, ``[bits, 1]``, with the bits set that digits of codes of ``widths`` may have."""
    largest = [(1 << width) - 1 >> shift & (1 << bits) - 1 for width in widths]
    return to_words(torch.tensor(largest, dtype=torch.int32).unsqueeze(1), bits).to(like.device)
