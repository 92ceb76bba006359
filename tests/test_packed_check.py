"""A packed prompt whose counts, starts or tensors do not fit together is refused before a kernel reads it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from packs import random_packed

from rdkv.kernels.packed import (
    CHANNEL_BITS,
    COLUMNS,
    KEY_EXPONENT,
    PINNED,
    TOKENS,
    VALUE_EXPONENT,
    Packed,
    join,
    layout,
)
from rdkv.kernels.packed_check import check


@pytest.fixture(scope="module")
def packed() -> Packed:
    return random_packed(device="cpu")


def with_count(packed: Packed, column: int, change: int, row: int = 1) -> Packed:
    """Another count in a row, on the host, on the device and in the starts of the rows after it."""
    counts = packed.counts.clone()
    counts[row, column] += change
    host = tuple(tuple(c[:KEY_EXPONENT]) for c in counts.tolist())
    return replace(packed, counts=counts, host_counts=host, starts=torch.tensor(layout(host, packed.dim)[0]))


@pytest.mark.parametrize("dim", [16, 64, 80, 256])
@pytest.mark.parametrize("tokens", [1, 17, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_the_packer_makes_is_sound(dim: int, tokens: int, dtype: torch.dtype) -> None:
    packed = random_packed(tokens=tokens, dim=dim, dtype=dtype, device="cpu")
    check(packed)
    check(join([packed, packed], [3, 0, 2, 1]))


# A width may end anywhere within a block without taking more or less of a tensor.
CHANGES = [(column, change) for column in range(KEY_EXPONENT) for change in (-1000, -16, 16, 32, 1000, 1 << 30)]
CHANGES += [(column, change) for column in (TOKENS, PINNED, COLUMNS) for change in (-1, 1)]


@pytest.mark.parametrize(("column", "change"), CHANGES)
def test_every_count_is_held_to_the_tensors(packed: Packed, column: int, change: int) -> None:
    with pytest.raises(ValueError, match=r"row 1|not \["):
        check(with_count(packed, column, change))


@pytest.mark.parametrize("column", range(5))
@pytest.mark.parametrize("start", [-1, 1 << 40, 10**6])
def test_every_start_is_within_its_tensor(packed: Packed, column: int, start: int) -> None:
    starts = packed.starts.clone()
    starts[2, column] = start
    with pytest.raises(ValueError, match=r"row 2: \d+ elements from -?\d+ on do not lie within \d+"):
        check(replace(packed, starts=starts))


@pytest.mark.parametrize(
    "name",
    [
        "key_codes", "key_columns", "key_affine", "value_codes", "value_affine", "pinned_keys", "pinned_values",
        "counts", "starts",
    ],
)  # fmt: skip
def test_every_tensor_has_its_shape_and_type(packed: Packed, name: str) -> None:
    tensor = getattr(packed, name)
    wrong: list[Any] = [tensor[:-1], torch.cat([tensor, tensor[:1]]), tensor.double(), tensor.unsqueeze(0)]
    if tensor.dim() > 1:
        wrong.append(tensor.t().contiguous().t() if tensor.dim() == 2 else tensor.transpose(0, 1))
    for other in wrong:
        with pytest.raises(ValueError, match=name):
            check(replace(packed, **{name: other}))


@pytest.mark.parametrize("column", [64, 4095, 64 | 7 << CHANNEL_BITS, -2, -(1 << 15), (1 << 15) - 1])
def test_columns_name_channels_and_places_that_there_are(packed: Packed, column: int) -> None:
    columns = packed.key_columns.clone()
    columns[5] = column
    with pytest.raises(ValueError, match="key_columns name a channel beyond 64"):
        check(replace(packed, key_columns=columns))


@pytest.mark.parametrize("column", [KEY_EXPONENT, VALUE_EXPONENT])
def test_exponents_are_those_of_a_scale(packed: Packed, column: int) -> None:
    counts = packed.counts.clone()
    counts[0, column] = 1024
    with pytest.raises(ValueError, match="exponent that no scale has"):
        check(replace(packed, counts=counts))


def test_host_and_device_agree(packed: Packed) -> None:
    counts = packed.counts.clone()
    counts[0, TOKENS] += 1
    with pytest.raises(ValueError, match="differ from their copy on the host"):
        check(replace(packed, counts=counts))


def test_sizes(packed: Packed) -> None:
    for changes in ({"batch": 0}, {"heads": -2, "batch": -2}, {"dim": 0}, {"dim": 4097}):
        with pytest.raises(ValueError, match="sequences of"):
            check(replace(packed, **changes))
    for changes in ({"batch": 3}, {"raw": packed.raw[1:]}, {"host_counts": packed.host_counts[1:]}):
        with pytest.raises(ValueError, match="rows of counts"):
            check(replace(packed, **changes))
    with pytest.raises(ValueError, match="row 0: 5 counts"):
        check(replace(packed, host_counts=tuple(row[:5] for row in packed.host_counts)))
    for raw in (-1, packed.host_counts[1][PINNED] + 1):
        with pytest.raises(ValueError, match=r"row 1: .* pinned tokens are raw"):
            check(replace(packed, raw=(0, raw, 0, 0)))


def test_columns_come_in_blocks_and_with_tokens(packed: Packed) -> None:
    assert packed.host_counts[-1][TOKENS] == 0
    with pytest.raises(ValueError, match="row 3: key columns"):
        check(with_count(packed, COLUMNS, 16, row=3))
