"""The cache under ``generate``: identity at budget 1, honest bytes, padding, sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generating import FAMILIES, IDS, LENGTHS, MASK, WAYS, cache_for, converse, generate, room
from harness import (
    DIM,
    HEADS,
    LAYERS,
    TOKEN_BYTES,
    forward,
    layer_of,
    new_cache,
    padding,
    prefill,
    random_qkv,
    reachable_tensors,
    storage_bytes,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import rdkv
from rdkv.runtime.errors import ConfigError, RdkvError


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    return rdkv.attach(tiny_model("llama", torch.bfloat16))


@pytest.fixture(scope="module")
def model32(tiny_model: Callable[..., Any]) -> Any:
    return rdkv.attach(tiny_model("llama"))


def test_sampling_here_is_not_greedy(model: Any) -> None:
    # Or the tests below would compare greedy search with itself.
    greedy, sampled = (generate(model, DynamicCache(), tokens=16, **way) for way in WAYS.values())
    assert not torch.equal(greedy, sampled)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 3])
def test_whole_budget_is_a_dynamic_cache(
    family: str, dtype: torch.dtype, way: str, batch: int, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(family, dtype)
    ids = IDS[:batch]
    full = DynamicCache()
    expected = generate(model, full, ids, 16, **WAYS[way])
    rdkv.attach(model)
    cache = cache_for(model, 1.0)
    assert torch.equal(generate(model, cache, ids, 16, **WAYS[way]), expected)
    for mine, theirs in zip(cache.layers, full.layers, strict=True):
        for name in ("keys", "values"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))
            assert getattr(mine, name).dtype == dtype
    assert cache.full_nbytes == storage_bytes(reachable_tensors(full))
    assert cache.nbytes == storage_bytes(reachable_tensors(cache)) == cache.prompt_full_nbytes + room(cache, batch)
    assert cache.retention == 1.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_whole_budget_of_a_padded_batch(family: str, way: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(family)
    expected = generate(model, DynamicCache(), tokens=16, attention_mask=MASK, **WAYS[way])
    cache = cache_for(rdkv.attach(model), 1.0)
    assert torch.equal(generate(model, cache, tokens=16, attention_mask=MASK, **WAYS[way]), expected)
    assert cache.retention == 1.0
    # A dynamic cache holds the padding as well.
    assert cache.prompt_nbytes == sum(LENGTHS) * TOKEN_BYTES * 2 * LAYERS


@pytest.mark.parametrize("budget", [0.1, 0.5, 1.0])
def test_rows_of_a_padded_batch_are_the_rows_alone(budget: float, model32: Any) -> None:
    together = cache_for(model32, budget)
    out = generate(model32, together, attention_mask=MASK, return_dict_in_generate=True, output_logits=True)
    for row, length in enumerate(LENGTHS):
        alone = cache_for(model32, budget)
        ids = IDS[row : row + 1, 40 - length :]
        single = generate(model32, alone, ids, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(single.sequences[0, length:], out.sequences[row, 40:])
        for mine, theirs in zip(out.logits, single.logits, strict=True):
            torch.testing.assert_close(mine[row], theirs[0], rtol=1e-3, atol=1e-3)
        for layer in range(LAYERS):
            mine_plan, plan = together.plan(layer), alone.plan(layer)
            assert (mine_plan.value_bits[row, :, 40 - length :] == plan.value_bits[0]).float().mean() > 0.95
            assert not mine_plan.kept[row, :, : 40 - length].any()


def test_what_the_padding_says_does_not_matter(model32: Any) -> None:
    noise = torch.where(MASK.bool(), IDS, 99)
    outs = [generate(model32, cache_for(model32), ids, attention_mask=MASK)[:, 40:] for ids in (IDS, noise)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("budget", [0.001, 0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_bytes_are_those_of_the_storages_held(
    budget: float, dtype: torch.dtype, mask: Tensor | None, model: Any, model32: Any
) -> None:
    model = model if dtype == torch.bfloat16 else model32
    cache = cache_for(model, budget)
    with torch.no_grad():
        model(IDS, attention_mask=mask, past_key_values=cache)
    element = 2 if dtype == torch.float32 and budget == 1.0 else 1  # in float32, untouched
    full = (sum(LENGTHS) if mask is not None else IDS.numel()) * TOKEN_BYTES * LAYERS * element
    assert cache.nbytes == cache.prompt_nbytes == storage_bytes(reachable_tensors(cache))
    assert cache.full_nbytes == cache.prompt_full_nbytes == full
    assert cache.retention == cache.nbytes / full <= budget
    assert cache.retention > 0.8 * budget or budget < 0.3
    packed = cache.prompt_nbytes
    ids = torch.cat([IDS, IDS[:, :4]], 1)
    more = {} if mask is None else {"attention_mask": torch.nn.functional.pad(mask, (0, 4), value=1)}
    generate(model, cache, ids, tokens=5, **more)
    assert cache.get_seq_length() == 40 + 4 + 4  # the last new token has not been through the model
    assert cache.nbytes == storage_bytes(reachable_tensors(cache))
    assert cache.nbytes - packed - room(cache, 3) in (0, 3 * 4 * LAYERS)  # lengths, where a kernel may read them
    assert cache.full_nbytes == full + 3 * 8 * TOKEN_BYTES * LAYERS * element
    assert (cache.prompt_nbytes, cache.prompt_full_nbytes) == (packed, full)
    assert cache.retention == packed / full


def test_full_bytes_are_those_of_a_dynamic_cache(model: Any) -> None:
    full = DynamicCache()
    generate(model, full, IDS[:1])
    for budget in (0.001, 0.3, 1.0):
        cache = cache_for(model, budget)
        generate(model, cache, IDS[:1])
        assert cache.full_nbytes == storage_bytes(reachable_tensors(full))


BUDGETS = st.one_of(
    st.fixed_dictionaries({"budget": st.floats(1e-6, 1.0)}),
    st.fixed_dictionaries({"budget": st.none(), "budget_tokens": st.integers(1, 70)}),
    st.fixed_dictionaries({"budget": st.none(), "budget_bytes": st.integers(1, 20_000)}),
)


@given(
    budget=BUDGETS,
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    allocator=st.sampled_from(["waterfill", "eviction"]),
    scope=st.sampled_from(["head", "layer", "model"]),
    positions=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
@example(budget={"budget": None, "budget_tokens": 8}, lengths=[8], allocator="waterfill", scope="head", positions=True,
         dtype=torch.float32)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_budget_is_never_exceeded(
    budget: dict[str, Any], lengths: list[int], allocator: str, scope: str, positions: bool, dtype: torch.dtype
) -> None:
    cache = new_cache(
        **budget, allocator=allocator, allocator_options={"scope": scope}, format_options={"positions": positions}
    )
    prefill(cache, random_qkv(len(lengths), max(lengths), dtype=dtype), padding(lengths))
    # Nothing is compressed at 1.0, so a float32 cache stays one and is measured against one.
    untouched = dtype == torch.float32 and budget.get("budget") == 1.0
    full = [length * TOKEN_BYTES * LAYERS * (2 if untouched else 1) for length in lengths]
    if budget.get("budget_tokens"):
        allowed = sum(min(f, budget["budget_tokens"] * TOKEN_BYTES * LAYERS) for f in full)
    elif budget.get("budget_bytes"):
        allowed = sum(min(f, budget["budget_bytes"]) for f in full)
    else:
        allowed = int(sum(f * budget["budget"] for f in full))
    assert cache.nbytes == storage_bytes(t for layer in range(LAYERS) for t in layer_of(cache, layer).tensors())
    assert cache.nbytes <= allowed
    assert cache.prompt_full_nbytes == sum(full)


@pytest.mark.parametrize(
    ("budget", "allowed"),
    [
        ({"budget_tokens": 10}, 10 * TOKEN_BYTES * LAYERS),
        ({"budget_tokens": 1000}, 40 * TOKEN_BYTES * LAYERS),
        ({"budget_bytes": 3000}, 3000),
        ({"budget_bytes": 10**9}, 40 * TOKEN_BYTES * LAYERS),
    ],
)
def test_budgets_in_tokens_and_bytes(budget: dict[str, int], allowed: int, model: Any) -> None:
    for rows in (1, 3):
        cache = cache_for(model, None, **budget)
        generate(model, cache, IDS[:rows])
        assert 0.8 * rows * allowed < cache.prompt_nbytes <= rows * allowed


@pytest.mark.parametrize("budget", [0.001, 0.3, 1.0])
@pytest.mark.parametrize("lengths", [[40], LENGTHS])
def test_plan_and_bits(budget: float, lengths: list[int]) -> None:
    cache = new_cache(budget)
    mask = padding(lengths)
    prefill(cache, random_qkv(len(lengths), 40), mask)
    forward(cache, 0, random_qkv(len(lengths), 3, seed=1), torch.nn.functional.pad(mask, (0, 3), value=True))
    real = mask[:, None, :].expand(-1, HEADS, -1)
    tokens: dict[str, float] = {}
    for layer in range(LAYERS):
        plan = cache.plan(layer)
        assert plan.value_bits.shape == plan.pinned.shape == (len(lengths), HEADS, 40)
        assert plan.key_bits.shape == (len(lengths), HEADS, DIM)
        assert not plan.value_bits[~real].any()
        assert (plan.value_bits[plan.pinned] == 16).all()
        kept = sum(int(segment.unpack()[2].sum()) for _, segment in layer_of(cache, layer).segments)
        assert int(plan.kept.sum()) == (kept if layer_of(cache, layer).segments else 40 * HEADS)
        for name, of_width in (("pinned", plan.pinned), *((str(w), plan.value_bits == w) for w in (0, 2, 4, 8, 16))):
            chosen = of_width & real & (plan.pinned if name == "pinned" else ~plan.pinned)
            tokens[name] = tokens.get(name, 0) + int(chosen.sum())
    bits = cache.bits
    for shares in bits.values():
        assert sum(shares.values()) == pytest.approx(1.0)
        assert min(shares.values()) > 0
    total = sum(lengths) * HEADS * LAYERS
    assert bits["value"] == pytest.approx({name: count / total for name, count in tokens.items() if count})


def test_order_of_bits() -> None:
    cache = new_cache(0.3)
    prefill(cache, random_qkv(1, 60))
    widths = [int(width) for width in cache.bits["value"] if width != "pinned"]
    assert widths == sorted(widths)


def test_plan_needs_a_prompt_and_its_positions(model: Any) -> None:
    cache = cache_for(model)
    for use in (lambda: cache.plan(0), lambda: cache.bits):
        with pytest.raises(RdkvError, match="no prompt yet"):
            use()
    assert (cache.nbytes, cache.full_nbytes, cache.retention, cache.get_seq_length()) == (0, 0, 1.0, 0)
    blind = cache_for(model, format_options={"positions": False})
    generate(model, blind)
    with pytest.raises(ConfigError, match="positions"):
        blind.plan(0)


@pytest.mark.parametrize("budget", [0.2, 1.0])
def test_prompts_of_one_token(budget: float, model: Any) -> None:
    ids = IDS[:, :1]
    cache = cache_for(model, budget)
    out = generate(model, cache, ids)
    assert out.shape == (3, 9)
    assert cache.retention <= budget
    if budget == 1.0:
        assert torch.equal(out, generate(model, DynamicCache(), ids))
    mixed = generate(model, cache_for(model, budget), attention_mask=padding([40, 1, 2]).long())
    assert mixed.shape == (3, 48)


@pytest.mark.parametrize(
    "budget", [{"budget": 1e-9}, {"budget": None, "budget_bytes": 1}, {"budget": 0.001}, {"budget": 0.02}]
)
@pytest.mark.parametrize("scope", ["head", "layer", "model"])
def test_budget_too_small_for_a_token(budget: dict[str, Any], scope: str, model: Any) -> None:
    cache = cache_for(model, **budget, allocator_options={"scope": scope})
    out = generate(model, cache, attention_mask=MASK)
    assert out.shape == (3, 48)
    allowed = budget.get("budget_bytes", 0) * 3 or budget["budget"] * cache.prompt_full_nbytes
    assert cache.prompt_nbytes <= allowed
    if allowed < 100:
        assert cache.bits["value"] == {"0": 1.0}
    assert converse(model, cache_for(model, **budget), MASK).shape == (3, 40 + 3 * 8 + 2 * 6)


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_several_answers_to_one_prompt(budget: float, model: Any) -> None:
    way = WAYS["sampled"] | {"num_return_sequences": 4}
    cache = cache_for(model, budget)
    out = generate(model, cache, IDS[:1], 16, **way)
    assert out.shape == (4, 56)
    assert len({tuple(row.tolist()) for row in out}) > 1
    assert cache.plan(0).value_bits.shape[0] == 4
    assert all(torch.equal(cache.plan(0).value_bits[0], bits) for bits in cache.plan(0).value_bits)
    assert torch.equal(out, generate(model, cache_for(model, budget), IDS[:1], 16, **way))
    if budget == 1.0:
        assert torch.equal(out, generate(model, DynamicCache(), IDS[:1], 16, **way))


def test_decoding_by_triton_is_that_by_torch(tiny_model: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # or by its interpreter
    model = rdkv.attach(tiny_model("llama", num_hidden_layers=1).to(device))
    ids, mask = IDS[:2, :30].to(device), padding([30, 21]).long().to(device)
    logits, caches = [], [cache_for(model, 0.5, backend=name) for name in ("torch", "triton")]
    for cache in caches:
        more = {"return_dict_in_generate": True, "output_logits": True}
        out = generate(model, cache, ids, 4, attention_mask=mask, **more)
        logits.append(torch.stack(out.logits))
        assert cache.nbytes == storage_bytes(reachable_tensors(cache))
    torch.testing.assert_close(logits[1], logits[0], rtol=2e-2, atol=2e-2)
    assert not [record for record in caplog.records if record.name == "rdkv"]
    assert caches[1].backend.backend is not None
    assert caches[1].backend.backend.name == "triton"
    assert caches[0].prompt_nbytes == caches[1].prompt_nbytes
    plans = sum(t.nbytes for t in caches[1].backend.tensors())
    assert plans > 0
    assert caches[1].nbytes == caches[0].nbytes + plans
