"""The layout that `rdkv.kernels.packed` describes, read one digit at a time; packed sequences joined."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rdkv.kernels import naive_pack
from rdkv.kernels.packed import (
    COLUMN_START,
    COLUMNS,
    KEY_START,
    NIBBLES,
    TOKENS,
    VALUE_AFFINE_START,
    VALUE_START,
    Packed,
    join,
    value_planes,
)

WIDTHS = torch.tensor([0, 2, 4, 8, 16])


def random_packed(batch: int, tokens: int, dim: int, seed: int, shares: torch.Tensor | None = None) -> Packed:
    """Two heads a sequence, tokens of every width and pinned ones; key channels of each width by ``shares``."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, 2, tokens, dim, generator=generator)
    value_bits = WIDTHS[torch.randint(5, (batch, 2, tokens), generator=generator)].byte()
    shares = torch.ones(5) if shares is None else shares
    key_bits = WIDTHS[torch.multinomial(shares, batch * 2 * dim, True, generator=generator)].byte()
    pinned = torch.rand(batch, 2, tokens, generator=generator) < 0.1
    return naive_pack.pack(keys, values, value_bits, key_bits.reshape(batch, 2, dim), pinned)


def digit(words: list[int], at: int, lane: int, bits: int) -> int:
    """The ``lane``-th digit of a word."""
    shift = 4 * lane if bits == 4 else (0, 4, 2, 6, 8, 12, 10, 14)[lane]
    return words[at] >> shift & (1 << bits) - 1


def read_keys(packed: Packed, row: int) -> list[list[int]]:
    """Key codes ``[n][D]`` of one row, as the documentation of `Packed` says where they are."""
    counts, starts = packed.host_counts[row], packed.starts[row].tolist()
    columns, nibbles = counts[COLUMNS], counts[NIBBLES]
    words = packed.key_codes[starts[KEY_START] :].tolist()
    entries = packed.key_columns[starts[COLUMN_START] :][: columns - nibbles].tolist()
    codes = [[0] * packed.dim for _ in range(counts[TOKENS])]
    for slot, code in enumerate(codes):
        octet, lane = divmod(slot, 8)
        for place, entry in enumerate(entries):
            if entry < 0:
                continue
            if place < nibbles:
                value = digit(words, octet * columns + lane // 4 * nibbles + place, lane % 4, 4)
            else:
                value = digit(words, octet * columns + nibbles + place, lane, 2)
            code[entry & 255] += value << 2 * (entry >> 8)
    return codes


def read_values(packed: Packed, row: int) -> list[list[int]]:
    """Value codes ``[n][D]`` of one row, likewise."""
    counts, at, dim = packed.host_counts[row], int(packed.starts[row, VALUE_START]), packed.dim
    words = packed.value_codes.tolist()
    codes = [[0] * dim for _ in range(counts[TOKENS])]
    for plane in value_planes(counts):
        for slot, code in enumerate(codes):
            block, octet, lane = slot // 16 - plane.first, slot // 8 % 2, slot % 8
            if not plane.first <= slot // 16 < plane.end:
                continue
            for channel in range(dim):
                if plane.bits == 4:
                    value = digit(words, at + ((block * 2 + lane // 4) * dim + channel) * 2 + octet, lane % 4, 4)
                else:
                    value = digit(words, at + (block * dim + channel) * 2 + octet, lane, 2)
                code[channel] += value << plane.shift
        at += plane.words(dim)
    return codes


SHARES = st.lists(st.integers(0, 4), min_size=5, max_size=5).filter(any)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.sampled_from([1, 5, 33, 64]), st.integers(0, 2**31), SHARES)
@example(70, 64, 0, [0, 0, 1, 0, 0])
@example(40, 33, 0, [0, 0, 0, 0, 1])
@example(40, 33, 0, [0, 1, 0, 0, 0])
def test_codes_are_where_they_are_said_to_be(tokens: int, dim: int, seed: int, shares: list[int]) -> None:
    packed = random_packed(1, tokens, dim, seed, torch.tensor(shares).float())
    keys, values, _ = naive_pack.unpack(packed)
    for row, counts in enumerate(packed.host_counts):
        coded = slice(len(keys[row]) and int(counts[4]), int(counts[4]) + counts[TOKENS])
        key_scale, key_zero = packed.key_affine[row].float().unbind(1)
        key_codes = torch.tensor(read_keys(packed, row)).reshape(-1, dim)
        assert torch.equal(keys[row, coded], key_codes * key_scale + key_zero)
        affine = packed.value_affine[packed.starts[row, VALUE_AFFINE_START] :][: counts[TOKENS]].float()
        value_codes = torch.tensor(read_values(packed, row)).reshape(-1, dim)
        assert torch.equal(values[row, coded], value_codes * affine[:, :1] + affine[:, 1:])
