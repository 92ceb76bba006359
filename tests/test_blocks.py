"""Tails that are compressed as they grow: what is kept, what a step attends to, and that memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import reachable_tensors, storage_bytes

import rdkv
from rdkv.kernels.backends import ChosenBackend
from rdkv.kernels.packed import PINNED
from rdkv.plugins.rdkv.format import MixedBit
from rdkv.runtime.engine.batch import Batch
from rdkv.runtime.engine.blocks import TAIL_BLOCK, WINDOW, RecentQueries
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
        assert bool(runner.batch.lengths.max() < 2 * WINDOW) == (block is not None)
        with torch.inference_mode():
            runner.batch.reserve()
            runner.batch.advance()
            return made.forward.step(torch.tensor([5, 6, 7]), runner.batch)

    mine, plain = logits(WINDOW), logits(None)
    assert (mine - plain).norm() < 0.1 * plain.norm()
    assert not torch.equal(mine, plain)


def packed_bytes(batch: Batch) -> int:
    return storage_bytes(t for layer in batch.layers for _, part in layer.parts for t in part.tensors())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_blocks_in_one_segment_are_those_apart(
    backend: str, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(tiny_model, 0.3, backend=backend)
    generator = torch.Generator().manual_seed(0)
    forced = torch.randint(3, 259, (3 * WINDOW + 5, 3), generator=generator)

    def logits() -> torch.Tensor:
        runner = start(made)
        batch = runner.batch
        batch.backend.wanted = "torch"  # but for the last step, whose backend is the one asked for
        for tokens in forced:
            runner.tokens = tokens.clone()  # steps write there
            runner.step()
        batch.backend = ChosenBackend(backend)
        with torch.inference_mode():
            batch.reserve()
            batch.advance()
            return made.forward.step(torch.tensor([5, 6, 7]), batch)

    together = logits()
    monkeypatch.setattr(MixedBit, "concatenate", lambda *arguments: None)
    torch.testing.assert_close(together, logits(), rtol=1e-2, atol=1e-2 if backend == "triton" else 1e-3)


def test_blocks_have_no_sinks(tiny_model: Callable[..., Any]) -> None:
    runner = start(engine(tiny_model, 0.2))
    run(runner, LONG)
    packed = runner.batch.layers[0].parts[0][1].packed
    pinned = [row[PINNED] - raw for row, raw in zip(packed.host_counts, packed.raw, strict=True)]
    assert sum(pinned[:6]) > 0  # those of the prompts: three of two heads
    assert sum(pinned[6:]) == 0


def test_memory_is_bounded(tiny_model: Callable[..., Any]) -> None:
    runner = start(engine(tiny_model, 0.2))
    batch = runner.batch
    prompts = packed_bytes(batch)
    run(runner, LONG)
    longest = int(batch.lengths.max())
    assert batch.lengths.min() < 2 * WINDOW
    assert longest < 2 * WINDOW + 70
    assert [len(layer.parts) for layer in batch.layers] == [1, 1]  # steps attend to all of it at once
    (kept,) = {part.packed.batch // 3 - 1 for layer in batch.layers for _, part in layer.parts}
    assert kept == (LONG - 1 - WINDOW) // WINDOW  # a block is compressed before the step after it is full
    token = 2 * 2 * 2 * 16 * 2  # two layers of two heads, keys and values at 16 bits
    assert 0 < packed_bytes(batch) - prompts <= 0.2 * 3 * token * WINDOW * kept
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


def test_blocks_by_default_where_the_budget_is_a_share(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")

    def block(**budget: Any) -> int | None:
        return Engine(model, rdkv.CompressionConfig(**budget)).tail_block

    assert block(budget=0.3) == TAIL_BLOCK
    assert block(budget=1.0) is block(budget_tokens=40) is block(budget_bytes=9000) is None
    assert Engine(model, rdkv.CompressionConfig(budget=1.0), tail_block=WINDOW).tail_block == WINDOW


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
