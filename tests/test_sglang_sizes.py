"""What prompts take of the arena, known before they are read."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rdkv.kernels.arena_shape import EVEN, ArenaShape
from rdkv.plugins.sglang.ledger import Ledger
from rdkv.plugins.sglang.sizes import first_head, needs, rank_config, rank_heads, storage_dtype, store_shares
from rdkv.runtime.budget import layer_bits, layer_shares
from rdkv.runtime.config import CompressionConfig

SHAPE = ArenaShape(shares=(EVEN,) * 4, heads=8, dim=128, span=128, dtype=torch.bfloat16, places=5, nbytes=0)
EVENLY = layer_shares((1.0,) * 4)
UNEVENLY = layer_shares((0.1, 3.0, 0.7, 20.0))
LONGEST = 131_072
BUDGETS = [{"budget": 0.05}, {"budget": 0.6}, {"budget": 1.0}, {"budget_tokens": 1000}, {"budget_bytes": 30_000_000}]


def region_bytes(config: CompressionConfig, tokens: int) -> int:
    """Of a region, with even budgets."""
    return SHAPE.region_bytes(needs(SHAPE, config, tokens, EVENLY))


@pytest.mark.parametrize("tokens", [256, 10_000, LONGEST])
def test_a_region_is_the_budget_and_little_more(tokens: int) -> None:
    full = tokens * 8 * 4 * 128
    size = region_bytes(CompressionConfig(budget=0.05), tokens)
    assert size % SHAPE.unit == 0
    assert 0.05 * full - 1 <= size <= 0.05 * full + SHAPE.unit + 4 * 64


def test_budgets_in_tokens_and_bytes() -> None:
    assert region_bytes(CompressionConfig(budget_tokens=100), 10_000) == SHAPE.layer_bytes(100 * 8 * 4 * 128)
    total = CompressionConfig(budget_bytes=4_000_000)
    assert region_bytes(total, 10_000) == SHAPE.layer_bytes(1_000_000)
    assert rank_config(total, heads=2, all_heads=8).budget_bytes == 1_000_000
    assert rank_config(total, heads=8, all_heads=8) is total


@pytest.mark.parametrize(
    ("ranks", "heads", "firsts"), [(1, 8, [0]), (2, 8, [0, 4]), (4, 4, [0, 1, 2, 3]), (4, 2, [0, 0, 1, 1])]
)
def test_ranks_take_heads_in_order(monkeypatch: pytest.MonkeyPatch, ranks: int, heads: int, firsts: list[int]) -> None:
    """As SGLang deals them out; where there are more ranks than heads, some have the same."""
    model = SimpleNamespace(get_total_num_kv_heads=lambda: heads, get_num_kv_heads=lambda size: max(1, heads // size))
    context = ModuleType("sglang.srt.runtime_context")
    for name in ("sglang", "sglang.srt"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, context.__name__, context)
    for rank, first in enumerate(firsts):
        parallel = SimpleNamespace(attn_tp_rank=rank, attn_tp_size=ranks)
        monkeypatch.setattr(context, "get_parallel", lambda p=parallel: p, raising=False)
        assert first_head(model) == first
        assert first_head(model) + rank_heads(model) <= heads


@pytest.mark.parametrize("budget", BUDGETS)
def test_even_budgets_make_even_stores(budget: dict[str, float]) -> None:
    """To the byte: a layer's part of a region is the region."""
    config = CompressionConfig(**budget)  # type: ignore[arg-type]
    assert store_shares(SHAPE, config, LONGEST, EVENLY) == SHAPE.shares
    for tokens in (1, 300, 9999):
        bits = layer_bits(config, tokens, 128, 8, EVENLY)  # of one of 8 heads: bytes of all
        assert {region_bytes(config, tokens)} == {SHAPE.layer_bytes(each) for each in bits}
    region = slice(7 * SHAPE.unit, 12 * SHAPE.unit)
    assert [SHAPE.part(layer, region) for layer in range(4)] == [region] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_longest_prompt_wastes_no_store(budget: dict[str, float], dtype: torch.dtype) -> None:
    """Also where a layer has its full cache, and others have what its share is more."""
    config, empty = CompressionConfig(**budget), replace(SHAPE, dtype=dtype)  # type: ignore[arg-type]
    wanted = needs(empty, config, LONGEST, UNEVENLY)
    scale = 2 if dtype == torch.float32 else 1
    bits = [scale * each for each in layer_bits(config, LONGEST, 128, 8, UNEVENLY)]  # of one of 8 heads: bytes of all
    assert all(need >= each for need, each in zip(wanted, bits, strict=True))
    shape = replace(empty, shares=store_shares(empty, config, LONGEST, UNEVENLY), nbytes=sum(wanted))
    if config.budget == 1.0:
        assert bits == [scale * LONGEST * 2 * 128 * 16] * 4
        assert shape.shares == SHAPE.shares
    assert sum(shape.store_bytes) <= shape.layers * shape.nbytes
    assert shape.region_bytes(wanted) <= sum(wanted) / 4 + 2 * shape.unit


@given(
    st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=6),
    st.sampled_from(BUDGETS),
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60_000)), max_size=20),
)
def test_regions_hold_their_budgets_and_never_overlap(
    losses: list[float], budget: dict[str, float], steps: list[tuple[int, int]]
) -> None:
    """In no layer; each step reserves for an owner a prompt's region, or takes back what that owner has."""
    config, shares = CompressionConfig(**budget), layer_shares(tuple(losses))  # type: ignore[arg-type]
    empty = replace(SHAPE, shares=(EVEN,) * len(losses))
    shape = replace(empty, shares=store_shares(empty, config, LONGEST, shares), nbytes=200_000 * empty.unit)
    ledger, held = Ledger(shape.nbytes), dict[str, slice]()
    for owner, tokens in steps:
        if ledger.region(str(owner)) is not None:
            ledger.release(str(owner))
            del held[str(owner)]
            continue
        wanted = needs(shape, config, tokens, shares)
        if not ledger.reserve(str(owner), shape.region_bytes(wanted)):
            continue
        region = ledger.region(str(owner))
        assert region is not None
        for layer, (need, store) in enumerate(zip(wanted, shape.store_bytes, strict=True)):
            part = shape.part(layer, region)
            assert part.start % shape.unit == part.stop % shape.unit == 0
            assert part.stop - part.start >= need
            assert part.stop <= store
            others = [shape.part(layer, other) for other in held.values()]
            assert all(part.stop <= other.start or other.stop <= part.start for other in others)
        held[str(owner)] = region


def test_storage_types() -> None:
    assert storage_dtype(torch.bfloat16, CompressionConfig(budget=0.1)) == torch.bfloat16
    assert storage_dtype(torch.float32, CompressionConfig(budget=0.1)) == torch.float16
    assert storage_dtype(torch.float32, CompressionConfig(budget=1.0)) == torch.float32
