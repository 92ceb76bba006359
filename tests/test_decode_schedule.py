"""Work items made on the device, and attention by them over prompts in an arena: on a GPU, or in the interpreter."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from packs import DEVICE, random_packed
from stores import HEADS, LAYERS, filled
from torch import Tensor

from rdkv.kernels import naive, naive_decode
from rdkv.kernels.packed import Packed

pytest.importorskip("triton")
from rdkv.kernels.decode import attend
from rdkv.kernels.decode_plan import PACKED_ZONE, PINNED_ZONE, TAIL_ZONE, Tile
from rdkv.kernels.decode_schedule import Schedule

SMALL = Tile(16, 16, 16, 16, True, warps=1, registers=None, resident=1)
WIDTH = 600  # pages of a place
pytestmark = pytest.mark.usefixtures("poison")


def on_device(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def prompts(dim: int = 64) -> dict[int, Packed]:
    return {4: random_packed(1, HEADS, 150, dim), 2: random_packed(1, HEADS, 90, dim)}


def scheduled(places: list[int], lengths: list[int]) -> Schedule:
    schedule = Schedule(filled(prompts(), 64), len(places), SMALL)
    schedule.update(on_device(*places), on_device(*lengths), WIDTH)
    return schedule


def test_every_tile_and_token_once() -> None:
    """Of the sequences in the places 2, 0 and 4, of which 0 holds nothing; prompts count as 90 tokens each."""
    held = prompts()
    schedule = scheduled([2, 0, 4], [91, 300, 500])
    counts = {0: held[2].host_counts, 1: ((0,) * 7,) * HEADS, 2: held[4].host_counts}
    for plan in schedule.plans:
        bounds = plan.first_item.tolist()
        assert bounds[0] == 0
        for row, (first, last) in enumerate(pairwise(bounds)):
            items = plan.items[first:last]
            count, tail = counts[row // HEADS][row % HEADS], [1, 300, 410][row // HEADS]
            assert bool((items[:, 0] == row).all())
            sizes = {PACKED_ZONE: -(-count[0] // 128), PINNED_ZONE: count[4], TAIL_ZONE: tail}
            for zone, size in sizes.items():
                parts = items[items[:, 1] == zone][:, 2:].tolist()
                assert [end - begin > 0 for begin, end in parts] == [True] * len(parts)
                assert [0, *(end for _, end in parts)] == [*(begin for begin, _ in parts), size]
        rest = plan.items[bounds[-1] :]
        assert bool((rest[:, 2] == rest[:, 3]).all())
        assert len(rest) > 0
    assert schedule.tail_lengths.tolist() == [1, 300, 410]
    assert schedule.page_starts.tolist() == [2 * WIDTH + 90, 0, 4 * WIDTH + 90]


@pytest.mark.parametrize("dim", [64, 80])
def test_attends_to_arena_and_pool(dim: int) -> None:
    """The batch is in another order than the arena, and holds a sequence without a packed prompt."""
    held, places, lengths = prompts(dim), [2, 0, 4], [95, 40, 260]
    arena = filled(held, dim)
    pool = torch.randn(2, 700, HEADS, dim, device=DEVICE).to(torch.bfloat16)
    pages = torch.full((6, WIDTH), 699, dtype=torch.int32, device=DEVICE)
    order, taken = torch.randperm(600, device=DEVICE).int(), 0
    tails = []
    for place, length in zip(places, lengths, strict=True):
        start = 90 if place else 0
        pages[place, start:length] = order[taken : taken + length - start]
        tails.append(order[taken : taken + length - start].long())
        taken += length - start
    pool[:, 699] = float("nan")  # nobody's
    query = torch.randn(3, HEADS * 4, 1, dim, device=DEVICE).to(torch.bfloat16)
    schedule = Schedule(arena, 3, SMALL)
    schedule.update(on_device(*places), on_device(*lengths), WIDTH)
    for layer in range(LAYERS):
        tail = schedule.tail(pool[0], pool[1], pages, on_device(*places))
        output, lse = attend(query, arena.layers[layer], schedule.plans[layer], dim**-0.5, tail)
        for i, (place, slots) in enumerate(zip(places, tails, strict=True)):
            tokens = (part[slots].transpose(0, 1).unsqueeze(0) for part in pool)
            expected = naive.attention(query[i : i + 1], *tokens, dim**-0.5)
            if place:
                packed = naive_decode.attend(query[i : i + 1], held[place], dim**-0.5)
                expected = naive.merge_states(*expected, *packed)
            torch.testing.assert_close(output[i : i + 1], expected[0], rtol=0, atol=8e-3)
            torch.testing.assert_close(lse[i : i + 1], expected[1], rtol=0, atol=2e-2)


def test_an_update_forgets_the_step_before() -> None:
    schedule = scheduled([2, 4, 0], [580, 580, 580])
    schedule.update(on_device(0, 0, 2), on_device(1, 1, 91), WIDTH)
    assert schedule.tail_lengths.tolist() == [1, 1, 1]
    fresh = scheduled([0, 0, 2], [1, 1, 91])
    for again, plan in zip(schedule.plans, fresh.plans, strict=True):
        assert torch.equal(again.items, plan.items)
        assert torch.equal(again.first_item, plan.first_item)
