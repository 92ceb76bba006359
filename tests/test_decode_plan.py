"""Work items of decode attention: every tile and token of a row once, in order, evenly."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdkv.kernels import decode_plan
from rdkv.kernels.decode_plan import PACKED_ZONE, PINNED_ZONE, TAIL_ZONE, Tile, choose_tile, make_plan
from rdkv.kernels.packed import Packed

TILE = Tile(64, 128, 32, 16, False, warps=4, registers=None, resident=2)
SLOTS = TILE.octets * 8


class Counts:
    """What a plan is made of, of a packed prompt."""

    def __init__(self, counts: list[tuple[int, ...]], dim: int = 128) -> None:
        self.host_counts, self.dim, self.batch, self.heads = tuple(counts), dim, len(counts), 1
        self.counts = torch.zeros(len(counts), 9, dtype=torch.int32)


def packed(counts: list[tuple[int, ...]], dim: int = 128) -> Packed:
    return cast(Packed, Counts(counts, dim))


def of_zone(items: Tensor, row: int, zone: int) -> list[tuple[int, int]]:
    chosen = items[(items[:, 0] == row) & (items[:, 1] == zone)]
    return [(int(begin), int(end)) for _, _, begin, end in chosen]


rows = st.builds(
    lambda n, shares, pinned: (n, *(int(n * s) for s in sorted(shares, reverse=True)), pinned, 64, 16),
    st.integers(0, 40_000),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.integers(0, 2_000),
)


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=12), st.sampled_from([0, 1, 256, 5_000]))
def test_every_tile_and_token_once(counts: list[tuple[int, ...]], tail: int) -> None:
    plan = make_plan(packed(counts), tail, TILE)
    items = plan.items
    assert torch.equal(items[:, 0], items[:, 0].sort().values)
    bounds = plan.first_item.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(items)
    assert plan.most_items == max(b - a for a, b in pairwise(bounds))
    for row, count in enumerate(counts):
        assert bool((items[bounds[row] : bounds[row + 1], 0] == row).all())
        for zone, size in ((PACKED_ZONE, -(-count[0] // SLOTS)), (PINNED_ZONE, count[4]), (TAIL_ZONE, tail)):
            parts = of_zone(items, row, zone)
            ends = [0, *(end for _, end in parts)]
            assert ends[-1] == size
            assert [begin for begin, _ in parts] == ends[:-1]
            assert all(begin < end for begin, end in parts)


def test_pinned_tokens_can_be_left_out() -> None:
    items = make_plan(packed([(600, 0, 0, 0, 4, 64, 16)]), 0, TILE, pinned=False).items
    assert of_zone(items, 0, PINNED_ZONE) == []


def test_tiles_of_more_planes_weigh_more() -> None:
    """A row's first tiles, with 8-bit values, make shorter items than its last ones, with 2-bit values."""
    parts = of_zone(
        make_plan(packed([(100 * SLOTS, 50 * SLOTS, 50 * SLOTS, 0, 0, 64, 16)]), 0, TILE).items, 0, PACKED_ZONE
    )
    lengths = [end - begin for begin, end in parts]
    assert len(lengths) > 2
    assert lengths[0] < lengths[-1]


def test_the_last_wave_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_plan, "processors", lambda device: 10)  # 20 programs at a time
    items = make_plan(packed([(40 * SLOTS, 0, 0, 0, 0, 64, 16)] * 7), 0, TILE).items
    assert len(items) % 20 >= 14 or len(items) % 20 == 0


def test_rows_of_more_columns_get_more_items() -> None:
    items = make_plan(packed([(40 * SLOTS, 0, 0, 0, 0, 64, 16), (40 * SLOTS, 0, 0, 0, 0, 640, 256)]), 0, TILE).items
    narrow, wide = (len(of_zone(items, row, PACKED_ZONE)) for row in (0, 1))
    assert 1 < narrow < wide


@pytest.mark.parametrize(
    ("columns", "nibbles", "expected"),
    [
        (0, 0, (0, 0, 0, False)),
        (16, 0, (0, 0, 16, False)),
        (48, 16, (16, 0, 16, False)),
        (240, 112, (128, 0, 16, False)),
        (192, 80, (128, 0, 32, False)),
        (288, 144, (128, 16, 0, False)),
        (384, 176, (128, 64, 32, False)),
        (400, 200, (128, 64, 0, True)),
        (160, 0, (0, 0, 128, True)),
    ],
)
def test_tiles_hold_the_columns_of_the_widest_head(columns: int, nibbles: int, expected: tuple[Any, ...]) -> None:
    tile = choose_tile(packed([(10, 0, 0, 0, 0, columns, nibbles), (5, 0, 0, 0, 0, 0, 0)]))
    assert (tile.nibbles, tile.more_nibbles, tile.pairs, tile.many) == expected


def test_large_prompts_keep_no_fewer_columns_than_the_compiler_takes_well() -> None:
    tile = choose_tile(packed([(100 * SLOTS, 0, 0, 0, 0, 288, 136)] * 8))
    assert (tile.octets, tile.nibbles, tile.more_nibbles, tile.pairs) == (64, 128, 64, 64)


def test_parts_of_a_sequence_come_together() -> None:
    counts = [(600, 0, 0, 0, 4, 64, 16), (700, 0, 0, 0, 4, 64, 16), (80, 0, 0, 0, 0, 64, 16), (0, 0, 0, 0, 0, 0, 0)]
    plan = make_plan(packed(counts), 300, TILE, sequences=2)
    first, second = plan.items[: plan.first_item[1]], plan.items[plan.first_item[1] :]
    assert len(plan.first_item) == 3
    assert set(first[:, 0].tolist()) == {0, 2}
    assert set(second[:, 0].tolist()) == {1}
    assert of_zone(plan.items, 2, PACKED_ZONE) == [(0, 1)]
    for row, tail in ((0, [(0, 150), (150, 300)]), (2, [])):
        assert of_zone(plan.items, row, TAIL_ZONE) == tail
