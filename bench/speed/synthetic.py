"""Packed prompts of random codes, in place of prompts of a hundred thousand tokens that would have to be packed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rdkv.kernels.naive_pack import PLANES, VALUE_ORDER, exponent
from rdkv.kernels.packed import BLOCK, PINNED, TOKENS, Packed, blocks, layout, value_planes

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
    columns = [_columns(w, row[-1]) for row, w in zip(sizes.counts, sizes.key_widths, strict=True)]
    packed = Packed(
        batch=batch,
        heads=heads,
        dim=dim,
        host_counts=sizes.counts,
        raw=tuple(0 if row[TOKENS] else row[PINNED] for row in sizes.counts),
        key_codes=words(total[0]),
        key_columns=torch.tensor([c for row in columns for c in row], dtype=torch.int16, device=device),
        key_affine=key_affine.half(),
        value_codes=words(total[1]),
        value_affine=value_affine.half(),
        pinned_keys=normal(total[4], dim),
        pinned_values=normal(total[4], dim),
        counts=torch.tensor(counts, dtype=torch.int32, device=device),
        starts=torch.tensor(starts, device=device),
    )
    _clear_unused(packed, starts, [sum(w) // 2 for w in sizes.key_widths])
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
    """Exponents of the largest key and value scale of a plane."""
    coded, *at_least = counts[:4]
    widths = [width for width, count in zip((4, 8, 16), at_least, strict=True) if count]
    keys = [width for width in set(key_widths) if width]

    def largest(found: list[int]) -> int:
        scales = _scales(torch.tensor(found)).half().tolist()
        return exponent(max((s * 4.0 ** (w // 2 - 1) for s, w in zip(scales, found, strict=True)), default=0.0))

    return (largest(keys), largest([2, *widths])) if coded else (0, 0)


def _columns(widths: list[int], count: int) -> list[int]:
    """Key columns of a row: planes of the channels that have them, then padding up to ``count``."""
    if not count:
        return []
    found = [c | plane << 8 for plane, least in enumerate(PLANES) for c, width in enumerate(widths) if width >= least]
    return found + [-1] * (count - len(found))


def _clear_unused(packed: Packed, starts: list[list[int]], used: list[int]) -> None:
    """Codes of slots beyond a plane's, and of columns of padding, are 0."""
    # Of the two words of a block of which so many slots are used: the bits to keep.
    keep = [[(1 << 2 * max(0, min(slots - first, 8))) - 1 for first in (0, 8)] for slots in range(BLOCK)]
    masks = torch.tensor(keep, device=packed.counts.device).to(torch.int16)  # [16, 2]
    for counts, (key_start, value_start, *_), real in zip(packed.host_counts, starts, used, strict=True):
        rest, length = counts[TOKENS] % BLOCK, 2 * blocks(counts[TOKENS])
        keys = packed.key_codes[key_start:][: length * counts[-1]].view(length, counts[-1])
        if counts[-1] > real:
            keys[:, real:] = 0
        if rest:
            keys[-2:] &= masks[rest, :, None]
        for slots in value_planes(counts):
            end = value_start + 2 * packed.dim * blocks(slots)
            if slots % BLOCK:
                packed.value_codes[end - 2 * packed.dim : end].view(-1, 2).bitwise_and_(masks[slots % BLOCK])
            value_start = end
