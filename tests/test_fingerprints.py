"""Fingerprints: alike for the same model, not for any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from rdkv.runtime.errors import UnsupportedModelError
from rdkv.runtime.fingerprints import (
    ROWS,
    dtype_name,
    layer_devices,
    model_fingerprint,
    tokenizer_fingerprint,
)
from rdkv.runtime.support import cache_sizes

TinyModel = Callable[..., Any]


def test_a_model_is_itself_wherever_it_is_read_from(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    assert model_fingerprint(model) == model_fingerprint(tiny_model("llama"))
    model.save_pretrained(tmp_path / "elsewhere")
    assert model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere")) == model_fingerprint(model)


def test_other_models_differ(tiny_model: TinyModel) -> None:
    models = [
        tiny_model("llama"),
        tiny_model("llama", seed=1),
        tiny_model("llama", torch.bfloat16),
        tiny_model("mistral"),
        tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        tiny_model("llama", rms_norm_eps=1e-3),
    ]
    assert len({model_fingerprint(model) for model in models}) == len(models)


def test_every_weight_counts(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    before = model_fingerprint(model)
    for name, weight in model.named_parameters():
        with torch.no_grad():
            last = weight[-1].clone()
            weight[-1] *= 1.01
            assert model_fingerprint(model) != before, name
            weight[-1] = last
    assert model_fingerprint(model) == before


def test_rows_in_between_are_not_looked_at(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    before, weight = model_fingerprint(model), model.model.layers[0].mlp.up_proj.weight
    assert weight.shape[0] > ROWS
    with torch.no_grad():
        weight[1] += 1
    assert model_fingerprint(model) == before  # as its docstring says


def test_an_offloaded_model_has_none(tiny_model: TinyModel) -> None:
    with pytest.raises(UnsupportedModelError, match=r"the weight .* is offloaded"):
        model_fingerprint(tiny_model("llama").to("meta"))


def test_tokenizers(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    before = tokenizer_fingerprint(tiny_tokenizer, chat=True)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(read, chat=True) == before
    read("some text", truncation=True, max_length=3, padding="max_length")  # leaves its mark on a tokenizer
    assert tokenizer_fingerprint(read, chat=True) == before
    read.chat_template += " "
    assert tokenizer_fingerprint(read, chat=True) != before
    assert tokenizer_fingerprint(read, chat=False) == tokenizer_fingerprint(tiny_tokenizer, chat=False)
    read.add_tokens(["fox"])
    assert tokenizer_fingerprint(read, chat=False) != tokenizer_fingerprint(tiny_tokenizer, chat=False)


def test_what_becomes_of_a_text_counts(tiny_tokenizer: Any) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokenizer_fingerprint(other, chat=False) != tokenizer_fingerprint(tiny_tokenizer, chat=False)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"])
def test_sizes(tiny_model: TinyModel, family: str) -> None:
    model = tiny_model(family, torch.bfloat16)
    assert cache_sizes(model.config) == (2, 2, 16)
    assert dtype_name(model) == "bfloat16"
    assert layer_devices(model, 2) == [torch.device("cpu")] * 2
