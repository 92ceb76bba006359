"""The engine's benchmark on a tiny model without a GPU: its records, what fails in them, and their table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.speed import engine as bench
from bench.speed import full_cache, table, timing
from bench.speed.compress import make_model
from rdkv import CompressionConfig
from rdkv.runtime.engine.engine import Engine
from rdkv.runtime.engine.runner import Runner
from rdkv.runtime.engine.sampling import Sampling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(make_model(2, DEVICE, num_key_value_heads=2, **SHAPE), CompressionConfig(budget=0.3))


def measure(engine: Engine, *flags: str, tokens: int = 200, batch: int = 3) -> dict[str, Any]:
    arguments = bench.parser().parse_args(["--out", "x", "--budget", "0.3", "--steps", "2", "--runs", "1", *flags])
    return bench.measure(engine, tokens, batch, arguments)


def test_a_record_and_its_row(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)

    def milliseconds(run: Callable[[], Any]) -> float:
        run()
        return 1.5

    monkeypatch.setattr(timing, "milliseconds", milliseconds)
    record = measure(engine)
    assert [record[f"{part}_reason"] for part in ("floor", "ours", "full", "transformers")] == [None] * 4
    assert record["floor_ms"] == 1.5
    # Two layers of 64 x (64 + 2 x 32 + 64) + 3 x 64 x 48 weights, and the head.
    assert record["floor_bytes"] == 2 * (2 * (64 * 192 + 3 * 64 * 48) + 64 * 64)
    assert 0 < record["ours_held_bytes"] < 0.3 * record["ours_full_bytes"]
    assert record["ours_prefill_s"] <= record["ours_first_token_s"]
    assert (record["full_attention"], record["ours_graph"]) == ("sdpa", DEVICE == "cuda")
    assert min(record[f"{who}_ms"] for who in ("ours", "full", "transformers")) > 0
    page = table.fill("<!-- table: engine -->\n<!-- end -->", [record | timing.machine()])
    assert "| 200 | 3 | 30% |" in page
    assert "not measured" not in page


def test_what_fails_is_recorded_and_the_rest_goes_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(bench, "FullBatch", fails)
    record = measure(engine, "--skip", "floor", batch=1)
    assert record["full_reason"] == "OutOfMemoryError: no memory"
    assert "full_ms" not in record
    assert "floor_reason" not in record
    assert record["ours_reason"] is record["transformers_reason"] is None
    page = table.fill("<!-- table: engine -->\n<!-- end -->", [record | timing.machine()])
    assert "not measured" in page
    assert "Not measured: OutOfMemoryError: no memory" in page


def test_copies_have_bytes_of_their_own_and_the_same_tokens(engine: Engine) -> None:
    document = engine.compress(list(range(3, 63)) * 3)
    batch = bench.cloned(document, 4)
    one: Any = [segment for layer in document.cache.compressed_layers for _, segment in layer.segments]
    many: Any = [layer.parts[0][1] for layer in batch.layers]
    of_one, of_many = (sum(t.nbytes for each in found for t in each.packed.tensors()) for found in (one, many))
    assert of_many == 4 * of_one
    runner = Runner(engine.forward, batch, bench.logits_of(document, 4), [Sampling()] * 4)
    tokens = [runner.tokens.tolist()]
    for _ in range(3):
        runner.step()
        tokens.append(runner.tokens.tolist())
    (answer,) = engine.generate([[]], Sampling(max_new_tokens=4), after=document)
    assert [row[0] for row in tokens] == list(answer.tokens)
    assert all(len(set(row)) == 1 for row in tokens)


def test_full_cache_attends_to_its_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    config = make_model(2, "cpu", num_key_value_heads=2, **SHAPE).config
    batch = full_cache.FullBatch(config, 2, 37, DEVICE, torch.float32)
    query = torch.randn(2, 4, 1, 16, device=DEVICE)
    layer = batch.layers[1]
    keys, values = (t[:, :, :37].repeat_interleave(2, 1) for t in (layer.keys, layer.values))
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    layer.keys[:, :, 37:] = 9.0  # what is written after the prompts
    torch.testing.assert_close(batch.attend(1, query, 16**-0.5), expected, rtol=1e-3, atol=1e-3)
    assert not torch.equal(batch.layers[0].keys, layer.keys)
