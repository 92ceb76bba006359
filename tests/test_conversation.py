"""The cache over the turns of a conversation, and its forks, each a conversation of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generating import FAMILIES, IDS, MASK, cache_for, converse, generate, later_turn, room
from harness import (
    LAYERS,
    layer_of,
    storage_bytes,
)
from torch import Tensor
from transformers import DynamicCache

import rdkv
from rdkv.runtime.errors import RdkvError


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    return rdkv.attach(tiny_model("llama", torch.bfloat16))


@pytest.fixture(scope="module")
def model32(tiny_model: Callable[..., Any]) -> Any:
    return rdkv.attach(tiny_model("llama"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_turns_at_whole_budget(family: str, mask: Tensor | None, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(family)
    expected = converse(model, DynamicCache(), mask)
    assert torch.equal(converse(rdkv.attach(model), cache_for(model, 1.0), mask), expected)


@pytest.mark.parametrize("budget", [0.001, 0.1, 0.5])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_turns_join_the_tail(budget: float, mask: Tensor | None, model32: Any) -> None:
    cache = cache_for(model32, budget)
    seen: list[int] = []
    hook = model32.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    out = converse(model32, cache, mask)
    hook.remove()
    assert seen[0] == 40
    assert [n for n in seen if n > 1] == [40, 7, 7]  # each turn with the last token of the answer before it
    assert cache.get_seq_length() == out.shape[1] - 1
    assert cache.prompt_nbytes <= budget * cache.prompt_full_nbytes
    # In one pass what took one for each token: the same tail.
    again = cache_for(model32, budget)
    whole = torch.nn.functional.pad(torch.ones_like(IDS) if mask is None else mask, (0, 7), value=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for part in (slice(0, 40), slice(40, 47)):
            seen_by = {"attention_mask": whole[:, : part.stop], "position_ids": positions[:, part]}
            model32(out[:, part], past_key_values=again, **seen_by)
    mine, theirs = layer_of(cache).keys, layer_of(again).keys
    assert mine is not None
    assert theirs is not None
    torch.testing.assert_close(mine[:, :, :7], theirs, rtol=1e-2, atol=1e-2)


def test_inference_mode(model: Any) -> None:
    expected = converse(model, cache_for(model), MASK)
    cache = cache_for(model)
    with torch.inference_mode():
        first = generate(model, cache, attention_mask=MASK)
    ids, mask = later_turn(first, MASK, [6, 2, 4])
    second = generate(model, cache, ids, attention_mask=mask)
    assert torch.equal(second, expected[:, : second.shape[1]])


def test_caches_do_not_share_state(model: Any) -> None:
    budgets = (0.1, 0.7)
    caches = [cache_for(model, budget) for budget in budgets]
    firsts = [generate(model, cache, attention_mask=MASK) for cache in caches]
    for budget, cache, first in zip(budgets, caches, firsts, strict=True):
        ids, mask = later_turn(first, MASK, [6, 2, 4])
        second = generate(model, cache, ids, attention_mask=mask)
        assert torch.equal(second, converse(model, cache_for(model, budget), MASK, turns=2))


def read_prompt(model: Any, budget: float, mask: Tensor | None) -> rdkv.CompressedCache:
    cache = cache_for(model, budget)
    with torch.no_grad():
        model(IDS, attention_mask=mask, past_key_values=cache)
    return cache


@pytest.mark.parametrize("budget", [0.001, 0.3, 1.0])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_forks_answer_as_caches_of_their_own(budget: float, mask: Tensor | None, model: Any) -> None:
    lengths = [6] if mask is None else [6, 2, 4]
    turns = [later_turn(ids, mask, lengths) for ids in (IDS, IDS)]
    turns[1][0][:, 40:] += 1
    expected = [generate(model, read_prompt(model, budget, mask), ids, attention_mask=m) for ids, m in turns]
    cache = read_prompt(model, budget, mask)
    forks = [cache.fork(), cache.fork().fork()]
    for fork, (ids, m), answer in zip(forks, turns, expected, strict=True):
        assert torch.equal(generate(model, fork, ids, attention_mask=m), answer)
    # A fork of a cache that has gone on has the prompt alone.
    again = forks[0].fork()
    assert [c.get_seq_length() for c in (cache, again, *forks)] == [40, 40, 53, 53]
    assert torch.equal(generate(model, again, turns[1][0], attention_mask=turns[1][1]), expected[1])
    assert torch.equal(generate(model, cache, turns[0][0], attention_mask=turns[0][1]), expected[0])
    assert forks[0].prompt_nbytes == cache.prompt_nbytes
    forks[0].reset()
    assert cache.session.prompt_lengths == forks[1].session.prompt_lengths != []


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_forks_share_the_prompt_and_no_tail(budget: float, model: Any) -> None:
    with pytest.raises(RdkvError, match="no prompt yet"):
        cache_for(model, budget).fork()
    cache = read_prompt(model, budget, None)
    forks = [cache.fork() for _ in range(3)]

    def together() -> int:
        return storage_bytes(tensor for each in (cache, *forks) for tensor in each.tensors())

    assert together() == cache.nbytes
    turn, _ = later_turn(IDS, None, [6])
    for fork in forks:
        generate(model, fork, turn)
    tails = 3 * (room(cache, 3) + (cache.prompt_nbytes if budget == 1.0 else 0))  # an uncompressed prompt is in them
    assert together() - cache.nbytes - tails in (0, 3 * 3 * 4 * LAYERS)  # lengths, where a kernel may read them
