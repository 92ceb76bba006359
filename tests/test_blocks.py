"""Tails that are compressed as they grow: what is kept, what a step attends to, and that memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import reachable_tensors, storage_bytes

import rdkv
from rdkv.runtime.engine.batch import Batch
from rdkv.runtime.engine.blocks import WINDOW, RecentQueries
from rdkv.runtime.engine.engine import Engine
from rdkv.runtime.engine.runner import Runner
from rdkv.runtime.engine.sampling import Sampling
from rdkv.runtime.errors import ConfigError

PROMPTS = [list(range(5, 75)), list(range(100, 130)), list(range(200, 240))]
LONG = 300  # new tokens: four blocks of WINDOW are left behind on the way


def engine(tiny_model: Callable[..., Any], budget: float, block: int | None = WINDOW, **settings: Any) -> Engine:
    model = tiny_model("llama", max_position_embeddings=2048)
    return Engine(model, rdkv.CompressionConfig(budget=budget, **settings), tail_block=block)


def start(made: Engine) -> Runner:
    documents = [made.compress(ids) for ids in PROMPTS]
    logits = torch.stack([d.logits for d in documents if d.logits is not None])
    ways = [Sampling(temperature=2.0, seed=3, max_new_tokens=LONG)] * len(documents)
    return Runner(made.forward, Batch([d.cache for d in documents], made.tail_block), logits, ways)


def run(runner: Runner, steps: int) -> list[list[int]]:
    tokens = []
    for _ in range(steps):
        runner.step()
        tokens.append(runner.tokens.tolist())
    return tokens


def test_blocks_that_are_kept_whole_change_nothing(tiny_model: Callable[..., Any]) -> None:
    blocks, plain = start(engine(tiny_model, 1.0)), start(engine(tiny_model, 1.0, None))
    assert run(blocks, LONG) == run(plain, LONG)
    assert [len(layer.parts) for layer in blocks.batch.layers] == [4, 4]  # the prompts are in the tails
    assert [len(layer.parts) for layer in plain.batch.layers] == [0, 0]


@pytest.mark.parametrize("settings", [{}, {"allocator_options": {"scope": "model"}}, {"scorer": "expected-attention"}])
def test_a_generous_budget_changes_little(settings: dict[str, Any], tiny_model: Callable[..., Any]) -> None:
    def logits(block: int | None) -> torch.Tensor:
        made = engine(tiny_model, 0.9, block, **settings)
        runner, generator = start(made), torch.Generator().manual_seed(0)
        for _ in range(2 * WINDOW + 20):
            runner.tokens = torch.randint(3, 259, (3,), generator=generator)
            runner.step()
        assert (len(runner.batch.layers[0].parts) > 1) == (block is not None)
        with torch.inference_mode():
            runner.batch.reserve()
            runner.batch.advance()
            return made.forward.step(torch.tensor([5, 6, 7]), runner.batch)

    mine, plain = logits(WINDOW), logits(None)
    assert (mine - plain).norm() < 0.1 * plain.norm()
    assert not torch.equal(mine, plain)


def test_memory_is_bounded(tiny_model: Callable[..., Any]) -> None:
    runner = start(engine(tiny_model, 0.2))
    run(runner, LONG)
    batch = runner.batch
    longest = int(batch.lengths.max())
    assert batch.lengths.min() < 2 * WINDOW
    assert longest < 2 * WINDOW + 70
    (kept,) = {len(layer.parts) for layer in batch.layers}
    assert kept == 1 + (LONG - 1 - WINDOW) // WINDOW  # a block is compressed before the step after it is full
    token = 2 * 2 * 2 * 16 * 2  # two layers of two heads, keys and values at 16 bits
    packed = storage_bytes(t for layer in batch.layers for _, part in layer.parts[1:] for t in part.tensors())
    assert 0 < packed <= 0.2 * 3 * token * WINDOW * (kept - 1)
    assert all(layer.keys.shape[2] <= 512 for layer in batch.layers)  # room for more was not taken
    assert batch.positions.tolist() == [len(ids) - 1 + LONG for ids in PROMPTS]


def test_the_engine_takes_the_option(tiny_model: Callable[..., Any]) -> None:
    made = engine(tiny_model, 0.3)
    answers = made.generate(PROMPTS, Sampling(max_new_tokens=2 * WINDOW + 40))
    other = engine(tiny_model, 0.3, None).generate(PROMPTS, Sampling(max_new_tokens=2 * WINDOW + 40))
    for mine, theirs in zip(answers, other, strict=True):
        assert mine.tokens[: 2 * WINDOW] == theirs.tokens[: 2 * WINDOW]
    with pytest.raises(ConfigError, match=f"tail_block is 8; it must be at least {WINDOW} tokens"):
        engine(tiny_model, 0.3, 8)


def test_queries_are_kept_in_order() -> None:
    recent = RecentQueries(torch.device("cpu"))
    queries = torch.randn(2 * WINDOW + 5, 2, 4, 1, 8)
    for query in queries:
        recent.advance()
        recent.write(0, query, 0.5)
    expected = queries[-WINDOW:].squeeze(3).permute(1, 2, 0, 3)
    assert torch.equal(recent.ordered(0), expected)
    assert recent.scales == {0: 0.5}
    assert {t.shape for t in reachable_tensors(recent)} == {(1,), (2, 4, WINDOW, 8)}
