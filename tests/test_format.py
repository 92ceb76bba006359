"""The mixed-bit format's ladder: what plans cost, to the bit, and what their bytes are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from mixed import (
    ALL_WIDTHS,
    ONE_HEAD_EMPTY,
    ONE_HEAD_RAW,
    ONE_TOKEN,
    ONLY_PINNED,
    Case,
    cases,
    empty,
    make_case,
    quick,
)
from torch import Tensor

from rdkv.plugins.rdkv.format import MixedBit, MixedBitOptions
from rdkv.runtime.errors import ConfigError
from rdkv.runtime.ladder import Distortion

# 15 digits of 4 bits fill no block, and their halves with 3 channels of 2 bits one more than two blocks.
MOST_COLUMNS = make_case(torch.full((1, 1, 5), 4), torch.tensor([[[4] * 15 + [2] * 3 + [0] * 14]]), empty(1, 1, 5))


def held_tensors(item: object) -> Iterator[Tensor]:
    """Every tensor in the fields of a segment, found without its help."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, (tuple, list)):
        for part in item:
            yield from held_tensors(part)
    elif dataclasses.is_dataclass(item):
        for field in dataclasses.fields(item):
            yield from held_tensors(getattr(item, field.name))


def blocks(count: int) -> int:
    return -(-count // 16)


def key_columns(widths: Sequence[int]) -> tuple[int, int, int]:
    """Words of an octet's keys for channels of these widths, entries of columns, and those that few heads need."""
    digits, pairs = sum(width // 4 for width in widths), widths.count(2) + widths.count(6)
    left, nibbles = digits % 16, digits // 16 * 16
    columns = 16 * blocks(pairs + 2 * left)
    return 2 * nibbles + columns, nibbles + columns, nibbles + columns - digits - pairs


def expected_bytes(case: Case, positions: bool) -> tuple[int, int]:
    """Bytes of a packed case, and how many bits its ladder reserves beyond them."""
    plan, (tokens, dim) = case.plan, case.keys.shape[2:]
    if plan.is_identity or not bool(plan.kept.any()):
        return 4 * dim * int(plan.kept.sum()), 0
    total = spare = classes = 0
    for b, h in np.ndindex(*plan.value_bits.shape[:2]):
        bits, apart = plan.value_bits[b, h], case.apart[b, h]
        n, n4, n8, n16 = (int((~apart & (bits >= width)).sum()) for width in (2, 4, 8, 16))
        pins, raw = int(apart.sum()), int((apart & ~plan.pinned[b, h]).sum())
        columns, entries, few = key_columns(plan.key_bits[b, h].tolist() if n else [])
        planes = blocks(n) + blocks(n4) + 2 * blocks(n8) + 4 * blocks(n16)
        total += 4 * blocks(n) * columns + 2 * entries  # key words, columns
        total += 4 * dim * planes + 4 * n  # value words, affine
        total += 4 * dim * pins + 4 * dim + 9 * 4 + 5 * 8  # pinned, key affine, counts and starts
        spare += 16 * (30 - few)  # 15 digits left over, whose halves fill two blocks of columns but for one
        if raw:  # keys and values that would have a scale, and whole columns
            spare += raw * (32 + -16 * dim % 32)
        classes += n + raw
        if positions:
            total += -(-tokens // 8) + 4 * (pins - raw)
            spare += 8
    return (total + -(-classes // 4), spare - -2 * classes % 8) if positions else (total, spare)


@quick
@given(cases(), st.integers(1, 40))
@example(ALL_WIDTHS, 7)
@example(ONE_TOKEN, 1)
@example(ONLY_PINNED, 1)
@example(ONE_HEAD_EMPTY, 5)
@example(ONE_HEAD_RAW, 5)
@example(MOST_COLUMNS, 1)
def test_bytes_are_counted_and_promised(case: Case, group: int) -> None:
    tokens, dim = case.keys.shape[2:]
    for positions in (True, False):
        options = MixedBitOptions(positions=positions, channel_group=group)
        segment = MixedBit(options).pack(case.keys, case.values, case.plan)
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held_tensors(segment)}
        assert segment.nbytes == sum(storages.values())
        expected, spare = expected_bytes(case, positions)
        assert segment.nbytes == expected
        assert spare >= 0
        assert int(MixedBit(options).ladder(dim, tokens).cost(case.plan).sum()) == segment.nbytes * 8 + spare


def test_no_head_needs_more_columns_than_are_reserved() -> None:
    few = [key_columns([4] * fours + [2] * twos)[2] for fours in range(32) for twos in range(32)]
    assert min(few) == 0
    assert max(few) == 30
    assert key_columns(MOST_COLUMNS.plan.key_bits[0, 0].tolist())[2] == 30


def test_ladder_of_calibrated_distortions() -> None:
    values = {0: 1.0, 2: 0.5, 4: 0.25, 8: 0.125, 16: 0.0}
    keys = values | {6: 0.2}
    ladder = MixedBit().ladder(64, 10, Distortion(value=values, key=keys))
    assert ladder.value_distortion == (1.0, 0.5, 0.25, 0.125, 0.0)
    assert ladder.key_distortion == (1.0, 0.5, 0.25, 0.2, 0.125, 0.0)
    with pytest.raises(ConfigError, match="calibration lacks keys of 6 bits; measure the model again"):
        MixedBit().ladder(64, 10, Distortion(value=values, key=values))
    with pytest.raises(ConfigError, match="calibration lacks values of 8 bits"):
        MixedBit().ladder(64, 10, Distortion(value={0: 1.0, 2: 0.5, 4: 0.25, 16: 0.0}, key=keys))


def test_losses_without_a_calibration_are_those_of_the_rotation_that_is_used() -> None:
    rotated, plain = (MixedBit(MixedBitOptions(rotate=rotate)).ladder(64, 10) for rotate in (True, False))
    assert plain.value_distortion[1] > 2 * rotated.value_distortion[1]
    assert plain.key_distortion == rotated.key_distortion
    paper = (MixedBit(MixedBitOptions(rotate=rotate, distortion="paper")).ladder(64, 10) for rotate in (True, False))
    assert len({ladder.value_distortion for ladder in paper}) == 1


@pytest.mark.parametrize("name", ["smollm2", "paper"])
def test_ladder_falls_and_costs_rise(name: Any) -> None:
    ladder = MixedBit(MixedBitOptions(distortion=name)).ladder(32, 10)
    for distortion, cost in (
        (ladder.value_distortion, ladder.value_cost),
        (ladder.key_distortion, ladder.key_cost),
    ):
        assert distortion[0] == 1.0
        assert distortion[-1] == 0.0
        assert list(distortion) == sorted(set(distortion), reverse=True)
        assert list(cost) == sorted(set(cost))
    assert ladder.full_cost == 10 * 2 * 32 * 16
