"""Packing and unpacking in plain PyTorch, one row at a time: the meaning of `Packed` and of its Triton kernels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from . import naive, naive_rotation
from .packed import (
    BLOCK,
    CHANNEL_BITS,
    COLUMN_START,
    COLUMNS,
    KEY_START,
    NIBBLES,
    PAIR_SHIFTS,
    PINNED,
    PINNED_START,
    TOKENS,
    VALUE_AFFINE_START,
    VALUE_START,
    NotFiniteError,
    Packed,
    blocks,
    join,
    key_places,
    value_planes,
)

VALUE_ORDER = (16, 8, 4, 2)  # widths of values in order of slots
NIBBLE_WIDTHS = (4, 8, 16, 16)  # the least width that has each digit of 4 bits
CHANNEL = (1 << CHANNEL_BITS) - 1  # mask of the channel in an entry of `Packed.key_columns`
SHIFTS = {2: PAIR_SHIFTS, 4: (0, 4, 8, 12)}  # where digits of as many bits stand in a word


def pack(
    keys: Tensor, values: Tensor, value_bits: Tensor, key_bits: Tensor, pinned: Tensor, rotate: bool = True
) -> Packed:
    """Pack tokens at their widths: 0, 2, 4, 8 or 16 bits, of keys 6 too.

    Args:
        keys, values: ``[B, H, T, D]`` floats; their type is the storage type of what is not quantised: of pinned
            tokens, and of all those of a row whose key channels and values are all of 16 bits.
        value_bits: ``[B, H, T]`` uint8; 0 drops a token, unless it is pinned.
        key_bits: ``[B, H, D]`` uint8; 0 keeps a channel's mean alone.
        pinned: ``[B, H, T]`` bool.
        rotate: quantise values under a rotation (`naive_rotation`).

    Raises:
        NotFiniteError: what is to be quantised is not finite, or exceeds float16.
    """
    batch, heads, tokens, dim = keys.shape
    span = naive_rotation.span(dim) if rotate else 1
    keys, values = keys.reshape(-1, tokens, dim), values.reshape(-1, tokens, dim)
    plan = (value_bits.reshape(-1, tokens), key_bits.reshape(-1, dim), pinned.reshape(-1, tokens))
    rows = [_pack_row(span, *row) for row in zip(keys, values, *plan, strict=True)]
    return dataclasses.replace(join(rows, range(len(rows))), batch=batch, heads=heads)


def _pack_row(span: int, keys: Tensor, values: Tensor, bits: Tensor, key_bits: Tensor, pinned: Tensor) -> Packed:
    """One row: ``[T, D]``, ``[T, D]``, ``[T]``, ``[D]``, ``[T]``."""
    coded = (bits > 0) & ~pinned
    raw = bool((key_bits == 16).all() & (bits[coded] == 16).all())
    apart = pinned | coded if raw else pinned
    slots = torch.cat([((bits == width) & ~apart).nonzero()[:, 0] for width in VALUE_ORDER])  # [n]
    counts = [int(((bits >= width) & ~apart).sum()) for width in (2, 4, 8, 16)]
    key_codes, columns, nibbles, key_affine, key_peak = _pack_keys(keys[slots].float(), key_bits)
    rotated = naive_rotation.rotate(values[slots], span).float()
    value_codes, value_affine, value_peak = _pack_values(rotated, bits[slots], narrow=span > 1)
    counts += [int(apart.sum()), len(columns) + nibbles, nibbles]
    return Packed(
        batch=1,
        heads=1,
        dim=keys.shape[1],
        span=span,
        host_counts=(tuple(counts),),
        raw=(int((coded & apart).sum()),),
        key_codes=key_codes,
        key_columns=columns,
        key_affine=key_affine.unsqueeze(0),
        value_codes=value_codes,
        value_affine=value_affine,
        pinned_keys=keys[apart],
        pinned_values=values[apart],
        counts=torch.tensor([[*counts, exponent(key_peak), exponent(value_peak)]], dtype=torch.int32).to(keys.device),
        starts=torch.zeros(1, PINNED_START + 1, dtype=torch.int64, device=keys.device),
    )


def _pack_keys(keys: Tensor, width: Tensor) -> tuple[Tensor, Tensor, int, Tensor, float]:
    """Words, columns, nibbles and affine of keys ``[n, D]`` of ``width`` ``[D]``, and the largest scale of a digit."""
    if keys.shape[0] == 0:
        nothing = torch.zeros(0, dtype=torch.int16, device=keys.device)
        return nothing, nothing, 0, torch.zeros(len(width), 2, dtype=torch.float16, device=keys.device), 0.0
    scale, zero = naive.affine_parameters(keys.amin(0), keys.amax(0), width.clamp(min=1))
    mean = keys.double().mean(0).float().half()
    scale, zero = torch.where(width > 0, scale, 0.0), torch.where(width > 0, zero, mean)
    affine = _finite(torch.stack([scale, zero], 1), "keys")
    codes = naive.quantize(keys, scale, zero, width)
    nibbles, pairs = key_columns(width)
    words = [to_words(_digits(codes, nibbles, 4), 4), to_words(_digits(codes, pairs, 2), 2)]
    key_codes = torch.cat([part.reshape(2 * blocks(len(keys)), -1) for part in words], 1)  # [2 * blocks(n), C]
    peak = scale.float() * 4.0 ** (width.float() / 2 - 1).clamp(min=0)
    return key_codes.flatten(), torch.cat([nibbles, pairs]), len(nibbles), affine, float(peak.max())


def key_columns(width: Tensor) -> tuple[Tensor, Tensor]:
    """Entries of `Packed.key_columns` for channels of ``width`` ``[D]``: of nibbles, and of 2-bit digits."""
    digits = [(width >= least).nonzero()[:, 0] | 2 * k << CHANNEL_BITS for k, least in enumerate(NIBBLE_WIDTHS)]
    nibbles = torch.cat(digits)
    full = len(nibbles) // BLOCK * BLOCK
    halves = torch.stack([nibbles[full:], nibbles[full:] + (1 << CHANNEL_BITS)], 1).flatten()
    top = (width == 6).nonzero()[:, 0] | 2 << CHANNEL_BITS
    pairs = torch.cat([(width == 2).nonzero()[:, 0], top, halves])
    return nibbles[:full].short(), torch.nn.functional.pad(pairs, (0, -len(pairs) % BLOCK), value=-1).short()


def _digits(codes: Tensor, columns: Tensor, bits: int) -> Tensor:
    """Digits of ``bits`` bits at each of ``columns`` of the codes ``[n, D]`` int32, 0 where it is -1."""
    column = columns.int().clamp(min=0)
    return (codes[:, column & CHANNEL] >> 2 * (column >> CHANNEL_BITS) & (1 << bits) - 1) * (columns >= 0)


def _pack_values(values: Tensor, width: Tensor, narrow: bool) -> tuple[Tensor, Tensor, float]:
    """Words and affine of values ``[n, D]`` of ``width`` ``[n]``, falling, and the largest scale of a digit."""
    bits = width.unsqueeze(1)  # [n, 1]
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    if narrow:
        low, high = narrowed(low, high, bits)
    scale, zero = naive.affine_parameters(low, high, bits)
    affine = _finite(torch.cat([scale, zero], 1), "values")
    codes = naive.quantize(values, scale, zero, bits)
    planes = []
    for plane in value_planes([int((width >= least).sum()) for least in (2, 4, 8, 16)]):
        part = codes[plane.first * BLOCK : plane.end * BLOCK]
        words = to_words(part >> plane.shift & (1 << plane.bits) - 1, plane.bits)
        words = words.reshape(-1, 2, plane.bits // 2, values.shape[1])  # block, octet, word, channel
        planes.append(words.permute(0, 2, 3, 1).flatten())
    peak = scale.float() * 4.0 ** (bits.float() / 2 - 1)
    return torch.cat(planes), affine, float(peak.max()) if len(width) else 0.0


def narrowed(low: Tensor, high: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """The middle five eighths of a range where four levels are to cover it, the whole of it elsewhere.

    Of Gaussians, which rotated values are close to, that is the least squared error for 64 to 128 channels (their
    extremes are 2.3 to 2.6 deviations out, the best levels at 0.5 and 1.5): half of that of the whole range.
    """
    extent, narrow = high - low, bits == 2
    inner = low + extent * 0.125 + extent * 0.0625, high - extent * 0.125 - extent * 0.0625
    return torch.where(narrow, inner[0], low), torch.where(narrow, inner[1], high)


def _finite(affine: Tensor, what: str) -> Tensor:
    if not bool(affine.isfinite().all()):
        raise NotFiniteError(what)
    return affine


def exponent(peak: float) -> int:
    """The least ``e`` with ``peak <= 2 ** e``; 0 for 0."""
    mantissa, power = math.frexp(peak)  # mantissa in [0.5, 1), or 0
    return power - 1 if mantissa == 0.5 else power


def to_words(digits: Tensor, bits: int) -> Tensor:
    """Words, ``[blocks(m) * bits, X]`` int16, of digits of ``bits`` bits ``[m, X]`` int32."""
    count, columns = digits.shape
    digits = torch.nn.functional.pad(digits, (0, 0, 0, -count % BLOCK))
    shifts = torch.tensor(SHIFTS[bits], dtype=torch.int32, device=digits.device)
    words = digits.reshape(blocks(count) * bits, 16 // bits, columns) << shifts[:, None]
    return words.sum(1, dtype=torch.int32).short()


def key_widths(packed: Packed) -> Tensor:
    """Width of each key channel, ``[R, D]`` uint8; rows that hold no token, or pinned ones alone: 0."""
    device = packed.key_columns.device
    widths = torch.zeros(packed.batch * packed.heads, packed.dim, dtype=torch.uint8, device=device)
    for row, (counts, starts) in enumerate(zip(packed.host_counts, packed.starts.tolist(), strict=True)):
        columns = packed.key_columns[starts[COLUMN_START] :][: key_places(counts)].int()
        bits = torch.full_like(columns, 2, dtype=torch.uint8)
        bits[: counts[NIBBLES]] = 4
        real = columns >= 0
        widths[row].index_add_(0, columns[real] & CHANNEL, bits[real])
        if counts[TOKENS] == 0 and packed.raw[row]:
            widths[row] = 16
    return widths


def unpack(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[R, N, D]`` float32 and which slots hold a token, ``[R, N]`` bool.

    Pinned tokens come first, then the coded ones; ``N`` is the most of any row. Slots beyond are 0.
    """
    rows, device = packed.batch * packed.heads, packed.counts.device
    keys, values = torch.empty(2, rows, packed.slots, packed.dim, device=device)
    for row, (counts, starts) in enumerate(zip(packed.host_counts, packed.starts.tolist(), strict=True)):
        tokens, pins = counts[TOKENS], counts[PINNED]
        pinned = slice(starts[PINNED_START], starts[PINNED_START] + pins)
        keys[row, :pins], values[row, :pins] = packed.pinned_keys[pinned], packed.pinned_values[pinned]
        keys[row, pins + tokens :], values[row, pins + tokens :] = 0.0, 0.0
        if tokens:
            coded = slice(pins, pins + tokens)
            scale, zero = packed.key_affine[row].float().unbind(1)
            _restore(_key_codes(packed, counts, starts), scale, zero, keys[row, coded])
            scale, zero = packed.value_affine[starts[VALUE_AFFINE_START] :][:tokens].float().unbind(1)
            scale = torch.nn.functional.pad(scale, (0, -tokens % BLOCK)).view(-1, 4, 1)
            _restore(_value_codes(packed, counts, starts), scale, zero.unsqueeze(1), values[row, coded])
            values[row, coded] = naive_rotation.restore(values[row, coded], packed.span)
    held = torch.tensor([c[TOKENS] + c[PINNED] for c in packed.host_counts], device=device)[:, None]
    return keys, values, torch.arange(packed.slots, device=device) < held


def _restore(codes: Tensor, scale: Tensor, zero: Tensor, out: Tensor) -> None:
    """``zero + scale * code`` of the first of `_raised` codes ``[m, 4, D]``, to ``out`` ``[n, D]``.

    Args:
        scale: ``[D]``, or ``[m, 4, 1]`` of each code.
        zero: ``[D]``, or ``[n, 1]``.
    """
    product = codes * (scale / _lanes(codes.device))
    torch.add(product.flatten(0, 1)[: len(out)], zero, out=out)


@cache
def _lanes(device: torch.device) -> Tensor:
    """Weights of the four nibbles of a word, ``[4, 1]``."""
    return torch.tensor([[1], [16], [256], [4096]], dtype=torch.int32, device=device)


def _raised(nibbles: Sequence[Tensor]) -> Tensor:
    """Codes times ``16 ** j``, ``[m, 4, D]`` int32, each by its place ``j`` in a word: no shift for each of them.

    Args:
        nibbles: words of each nibble of the codes, the lowest first: ``[m, D]`` int32, or as many as have it.
    """
    masks = 15 * _lanes(nibbles[0].device)
    codes = nibbles[0].unsqueeze(1) & masks
    for k, words in enumerate(nibbles[1:], 1):
        codes[: len(words)].add_(words.unsqueeze(1) & masks, alpha=16**k)
    return codes


def _as_nibbles(pairs: Tensor) -> Tensor:
    """Words of 2-bit digits ``[m, X]`` as words of nibbles ``[m, 2, X]``."""
    octets = torch.stack([pairs, pairs >> 8], 1)
    return octets & 0x33 | (octets & 0xCC) << 6  # in the order of `PAIR_SHIFTS`


def _key_codes(packed: Packed, counts: tuple[int, ...], starts: list[int]) -> Tensor:
    """Key codes of one row's coded tokens, `_raised`."""
    octets, nibbles, dim = 2 * blocks(counts[TOKENS]), counts[NIBBLES], packed.dim
    words = packed.key_codes[starts[KEY_START] :][: octets * counts[COLUMNS]].reshape(octets, -1)
    columns = packed.key_columns[starts[COLUMN_START] :][: key_places(counts)].int()
    upper, pairs = columns >> CHANNEL_BITS & 1, _as_nibbles(words[:, 2 * nibbles :])
    pairs[:, :, :-1] += pairs[:, :, 1:] * (4 * upper[nibbles + 1 :]).short()
    none = words.new_zeros(octets, 2, 1)  # where a channel has no such nibble
    parts = [words[:, : 2 * nibbles].reshape(octets, 2, nibbles), pairs, none]
    place = torch.where((columns < 0) | (upper > 0), 4 * dim, (columns >> CHANNEL_BITS + 1) * dim + (columns & CHANNEL))
    column = torch.full((4 * dim + 1,), len(columns), device=columns.device)
    column[place] = torch.arange(len(columns), device=columns.device)
    levels = int(columns.max() >> CHANNEL_BITS + 1) + 1 if len(columns) else 1
    # Columns of float32 are selected several times faster than those of integers.
    chosen = torch.cat(parts, 2).flatten(0, 1).float().index_select(1, column[: levels * dim]).int()
    return _raised(chosen.reshape(-1, levels, dim).unbind(1))


def _value_codes(packed: Packed, counts: tuple[int, ...], starts: list[int]) -> Tensor:
    """Codes of one row's values, `_raised`."""
    at, dim, nibbles = starts[VALUE_START], packed.dim, list[Tensor]()
    octets = torch.tensor([[[0]], [[16]]], dtype=torch.int32, device=packed.value_codes.device)
    for plane in value_planes(counts):
        size = plane.words(dim)
        if size:
            words = packed.value_codes[at : at + size].view(torch.int32).reshape(-1, 1, plane.bits // 2, dim)
            words = (words >> octets).flatten(0, 1)  # [octets, words of one, D]; what is above 16 bits has no meaning
            if plane.bits == 4:
                nibbles.append(words.flatten(0, 1))
            else:  # the last plane, of the blocks after those of the first
                nibbles[:1] = [torch.cat([*nibbles[:1], _as_nibbles(words[:, 0]).flatten(0, 1)])]
            at += size
    return _raised(nibbles)
