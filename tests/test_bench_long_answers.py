"""The benchmark of long answers on a tiny model: its scores are those of the same steps, and its table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.quality import long_answers as bench
from rdkv import CompressionConfig, Engine

PROMPT, ANSWER, BLOCK = 60, 300, 64
IDS = torch.randint(3, 259, (2, PROMPT + ANSWER), generator=torch.Generator().manual_seed(0))


def measured(model: Any, budget: float, block: int | None) -> dict[str, Any]:
    engine = Engine(model, CompressionConfig(budget=budget), tail_block=block)
    return bench.measure(engine, IDS, PROMPT, bench.full_logits(model, IDS, PROMPT))


def test_a_full_cache_diverges_from_itself_by_nothing(tiny_model: Callable[..., Any]) -> None:
    found = measured(tiny_model(), 1.0, None)
    assert torch.tensor(found["kl"]).shape == (ANSWER, 2)
    assert torch.tensor(found["kl"]).abs().max() < 1e-4
    assert torch.tensor(found["same"]).min() == 1.0
    assert found["packed_bytes"] == 0


def test_blocks_cost_something_and_save_memory(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    apart, together = measured(model, 0.1, BLOCK), measured(model, 0.1, None)
    first = 2 * BLOCK  # until then nothing is compressed but the prompt
    assert apart["kl"][: first - 1] == together["kl"][: first - 1]
    assert torch.tensor(apart["kl"])[first:].mean() > torch.tensor(together["kl"])[first:].mean()
    assert apart["tail_bytes"] < together["tail_bytes"]
    assert apart["packed_bytes"] > together["packed_bytes"]


def test_table() -> None:
    scores = {"kl": [[9.0, 9.0]] * 64 + [[0.1, 0.3]] * 512, "same": [[0.0, 0.0]] * 64 + [[1.0, 0.5]] * 512}
    record = scores | {"budget": 0.05, "block": 0, "tail_bytes": 10, "packed_bytes": 5, "full_bytes": 100}
    record |= {"step_ms": 1.2345, "device": "cpu", "dtype": "float32", "model": "m", "prompt": 2048, "answer": 576}
    made = bench.table([bench.compact(record), bench.compact(record | {"block": 256})]).splitlines()
    assert made[0] == "cpu, float32: m, 2 documents, prompts of 2,048 tokens, answers of 576."
    assert len(made) == 6
    assert made[4] == (
        "| 0.05 | none | 1.178 (1.089 to 1.267) | 0.200 (0.100 to 0.300) "
        "| 0.667 (0.444 to 0.889) | 0.750 (0.500 to 1.000) | 15.0% | 1.23 |"
    )
    assert made[5].startswith("| 0.05 | 256 | 1.178")


def test_texts_that_are_too_short(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")

    class Tokenizer:
        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            return type("Encoded", (), {"input_ids": list(range(len(text)))})

    assert bench.documents(Tokenizer(), tmp_path, 2, 1).tolist() == [[0], [2]]
    with pytest.raises(SystemExit, match="its text files have 3 tokens; 2 documents take 4"):
        bench.documents(Tokenizer(), tmp_path, 2, 2)
