"""A step by transformers' own modules and the fused one: the same tokens, beside each other in the same batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import rdkv
from rdkv.runtime.engine import fused
from rdkv.runtime.engine.engine import Engine
from rdkv.runtime.engine.forward import PlainForward
from rdkv.runtime.engine.fused import FusedForward
from rdkv.runtime.engine.sampling import Sampling

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"]
PROMPTS = [list(range(5, 45)), list(range(100, 109)), [7]]
ROPES: list[dict[str, Any]] = [
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
]  # fmt: skip


def engine(model: Any, budget: float, **settings: Any) -> Engine:
    return Engine(model, rdkv.CompressionConfig(budget=budget, **settings))


def both(make: Callable[[], Any], budget: float, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[Any]:
    """Answers of a fused engine and of a plain one."""
    found, way = [], Sampling(max_new_tokens=6)
    for known in (True, False):
        with monkeypatch.context() as patch:
            if not known:
                patch.setattr(fused, "known_decoder", lambda model: None)
            made = engine(make(), budget, **settings)
        assert isinstance(made.forward, FusedForward if known else PlainForward)
        document = made.compress(PROMPTS[0])
        batches = made.generate(PROMPTS, way) + made.generate([[9, 10], []], way, after=document)
        found.append(batches + made.generate(PROMPTS[:1], way))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_both_give_the_same_tokens(
    family: str, budget: float, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, plain = both(lambda: tiny_model(family), budget, monkeypatch)
    assert mine == plain


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_rotary_embeddings(
    rope: dict[str, Any], tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, plain = both(lambda: tiny_model("llama", rope_parameters={"rope_theta": 10000.0, **rope}), 0.3, monkeypatch)
    assert mine == plain


@pytest.mark.parametrize("settings", [{"allocator": "eviction"}, {"allocator_options": {"scope": "model"}}])
def test_other_plans(settings: dict[str, Any], tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    mine, plain = both(lambda: tiny_model("llama"), 0.2, monkeypatch, **settings)
    assert mine == plain


def test_whole_prompts_beside_packed_ones(tiny_model: Callable[..., Any]) -> None:
    """A budget in tokens keeps the short prompts as they are."""
    model = tiny_model("llama", torch.bfloat16)
    made = Engine(model, rdkv.CompressionConfig(budget_tokens=10))
    together = made.generate(PROMPTS, Sampling(max_new_tokens=6))
    assert [answer.tokens[:2] for answer in together] == [
        made.generate([ids], Sampling(max_new_tokens=6))[0].tokens[:2] for ids in PROMPTS
    ]


def test_steps_of_the_triton_kernels(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    from rdkv.kernels import step

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_model("qwen3", num_hidden_layers=1).to(device)
    way = Sampling(max_new_tokens=3)
    expected = engine(model, 0.5, backend="torch").generate(PROMPTS, way)
    made = engine(model, 0.5, backend="triton")
    assert isinstance(made.forward, FusedForward)
    monkeypatch.setattr(made.forward, "_step", step)
    assert made.generate(PROMPTS, way) == expected
