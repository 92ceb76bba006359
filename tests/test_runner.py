"""Decode steps: warmed up, captured once, captured anew when buffers are exchanged; and the same tokens as without."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

import rdkv
from rdkv.runtime.engine import batch, fused
from rdkv.runtime.engine.batch import Batch
from rdkv.runtime.engine.blocks import WINDOW
from rdkv.runtime.engine.engine import Engine
from rdkv.runtime.engine.runner import WARM_UP, Runner, draws
from rdkv.runtime.engine.sampling import Sampling

PROMPTS = [list(range(5, 75)), list(range(100, 130)), list(range(200, 240))]
WAYS = [
    Sampling(max_new_tokens=30),
    Sampling(max_new_tokens=30, temperature=1.2, seed=3),
    Sampling(max_new_tokens=30, temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=4),
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tails are exchanged after 8 tokens, and after 16."""
    monkeypatch.setattr(batch, "CAPACITY", 8)


def start(engine: Engine) -> Runner:
    document = engine.compress(PROMPTS[0])
    assert document.logits is not None
    return Runner(engine.forward, Batch([document.cache]), document.logits[None], WAYS[:1])


class Replayed:
    """Stands for a graph of a runner's step."""

    def __init__(self, runner: Runner, log: list[str]) -> None:
        self._runner, self._log = runner, log

    def replay(self) -> None:
        self._log.append("replay")
        self._runner._advance()


@pytest.mark.usefixtures("little_room")
def test_order_of_capturing(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model("llama"), rdkv.CompressionConfig(budget=0.3))
    plain, runner, log = start(engine), start(engine), []
    assert not runner.captures  # on the CPU
    runner.captures = True

    def aside() -> None:
        log.append("aside")
        runner._advance()

    def capture() -> None:
        log.append("capture")
        runner._graph = Replayed(runner, log)  # type: ignore[assignment]

    monkeypatch.setattr(runner, "_advance_aside", aside)
    monkeypatch.setattr(runner, "_capture", capture)
    for _ in range(20):
        plain.step()
        runner.step()
        assert torch.equal(plain.tokens, runner.tokens)
    period = ["aside"] * WARM_UP + ["capture"]
    assert log == period + ["replay"] * 6 + period + ["replay"] * 6 + period + ["replay"] * 2


def test_a_capture_that_fails_is_said_and_steps_go_on(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(tiny_model("llama"), rdkv.CompressionConfig(budget=0.3))
    plain, runner = start(engine), start(engine)
    plain.captures, runner.captures = False, True

    class NoGraph:
        def __init__(self) -> None:
            pass

    class Fails:
        def __init__(self, graph: Any) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", NoGraph)
    monkeypatch.setattr(torch.cuda, "graph", Fails)
    monkeypatch.setattr(runner, "_advance_aside", runner._advance)
    with caplog.at_level(logging.WARNING, "rdkv"):
        for _ in range(WARM_UP + 3):
            plain.step()
            runner.step()
            assert torch.equal(plain.tokens, runner.tokens)
    assert [record.getMessage() for record in caplog.records if record.name == "rdkv"] == [
        "decode steps run without a CUDA graph, since capturing one failed: "
        "operation not permitted when stream is capturing"
    ]


def test_seeds_of_sequences_without_one() -> None:
    torch.manual_seed(0)
    ways = [Sampling(temperature=1.0), Sampling(temperature=1.0), Sampling(temperature=1.0, seed=5), Sampling()]
    seeds = draws(ways, torch.device("cpu")).seeds.tolist()
    assert len(set(seeds)) == 4
    assert seeds[2:] == [5, 0]
    torch.manual_seed(0)
    assert draws(ways, torch.device("cpu")).seeds.tolist() == seeds


@needs_gpu
@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_gives_the_same_tokens(
    family: str, dtype: torch.dtype, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, dtype).to("cuda")
    engine = Engine(model, rdkv.CompressionConfig(budget=0.3))
    graphs = []
    capture = Runner._capture

    def counted(runner: Runner) -> None:
        capture(runner)
        graphs.append(runner._graph)

    monkeypatch.setattr(Runner, "_capture", counted)
    prompts, ways = [*PROMPTS, [7, 8]], [*WAYS, WAYS[1]]  # nothing of the last one is packed
    captured = engine.generate(prompts, ways)
    assert len(graphs) == 3  # at 8, 16 and 32 tokens of room
    assert None not in graphs
    monkeypatch.setattr(fused.FusedForward, "capturable", False)
    assert engine.generate(prompts, ways) == captured
    assert len(graphs) == 3


@needs_gpu
def test_graphs_and_blocks(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.bfloat16).to("cuda")
    engine = Engine(model, rdkv.CompressionConfig(budget=0.5), tail_block=WINDOW)
    ways = [Sampling(max_new_tokens=200, temperature=1.0, seed=seed) for seed in (1, 2)]
    captured = engine.generate(PROMPTS[:2], ways)
    monkeypatch.setattr(fused.FusedForward, "capturable", False)
    assert engine.generate(PROMPTS[:2], ways) == captured


@needs_gpu
def test_a_step_on_the_gpu_is_that_on_the_cpu(tiny_model: Callable[..., Any]) -> None:
    logits = []
    for device in ("cpu", "cuda"):
        engine = Engine(tiny_model("llama").to(device), rdkv.CompressionConfig(budget=0.3))
        together = Batch([engine.compress(ids).cache for ids in PROMPTS])
        with torch.inference_mode():
            together.reserve()
            together.advance()
            logits.append(engine.forward.step(torch.tensor([9, 10, 11], device=device), together).cpu())
    torch.testing.assert_close(logits[1], logits[0], rtol=2e-2, atol=2e-2)
