"""A recorded prompt compresses to what a pass of its own gives, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from transformers import DynamicCache

import rdkv
from rdkv.runtime.errors import RdkvError, UnsupportedModelError

IDS = torch.randint(3, 259, (2, 60), generator=torch.Generator().manual_seed(0))
MORE = torch.randint(3, 259, (2, 5), generator=torch.Generator().manual_seed(1))
CONFIGS: list[dict[str, Any]] = [
    {},
    {"allocator_options": {"scope": "model"}},
    {"scorer_options": {"window": 8, "channel_weight": "attention"}, "format_options": {"channel_group": 16}},
    {"scorer": "snapkv", "allocator": "eviction"},
    {"scorer": "expected-attention"},
]


def read(model: Any, cache: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids, past_key_values=cache).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_as_in_a_pass_of_its_own(
    family: str, settings: dict[str, Any], dtype: torch.dtype, tiny_model: Callable[..., Any]
) -> None:
    model = rdkv.attach(tiny_model(family, dtype))
    recording = rdkv.Recording(model.config)
    logits = read(model, recording)
    for budget in (0.2, 0.4, 1.0):
        config = rdkv.CompressionConfig(budget=budget, **settings)
        own, mine = rdkv.CompressedCache(model.config, config), recording.compress(config)
        assert torch.equal(read(model, own), logits)
        pairs = list(zip(own.tensors(), mine.tensors(), strict=True))
        assert len(pairs) >= 4
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
        assert own.prompt_nbytes == mine.prompt_nbytes
        assert own.prompt_full_nbytes == mine.prompt_full_nbytes
        assert torch.equal(read(model, own, MORE), read(model, mine, MORE))


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_packed_when_the_next_layer_is_there(scope: str, tiny_model: Callable[..., Any]) -> None:
    """As on a GPU, where packing is finished later."""
    model = rdkv.attach(tiny_model())
    recording = rdkv.Recording(model.config)
    read(model, recording)
    config = rdkv.CompressionConfig(budget=0.3, allocator_options={"scope": scope})
    own, mine = rdkv.CompressedCache(model.config, config), recording.compress(config)
    read(model, own)
    assert all(torch.equal(a, b) for a, b in zip(own.tensors(), mine.tensors(), strict=True))
    assert own.retention == mine.retention < 0.31


def test_full_cache_goes_on_from_the_prompt(tiny_model: Callable[..., Any]) -> None:
    model = rdkv.attach(tiny_model())
    recording, plain = rdkv.Recording(model.config), DynamicCache(config=model.config)
    assert torch.equal(read(model, recording), read(model, plain))
    expected = read(model, plain, MORE)
    for _ in range(2):  # one continuation leaves nothing behind for the next
        assert torch.equal(read(model, recording.full(), MORE), expected)
    assert recording.full().get_seq_length() == recording.get_seq_length() == 60


def test_scores_are_kept_when_asked(tiny_model: Callable[..., Any]) -> None:
    model = rdkv.attach(tiny_model())
    recording = rdkv.Recording(model.config)
    read(model, recording)
    cache = recording.compress(rdkv.CompressionConfig(budget=0.3), keep_scores=True)
    assert cache.scores(1)[0].token.shape == (2, 2, 60)


def test_errors(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    with pytest.raises(UnsupportedModelError, match="attach"):
        rdkv.Recording(model.config)
    rdkv.attach(model)
    recording = rdkv.Recording(model.config)
    with pytest.raises(RdkvError, match="no prompt yet"):
        recording.full()
    with pytest.raises(UnsupportedModelError, match="without padding"):
        model(IDS, attention_mask=torch.arange(60)[None] >= torch.tensor([[0], [9]]), past_key_values=recording)
    recording = rdkv.Recording(model.config)
    read(model, recording)
    with pytest.raises(RdkvError, match="holds its prompt"):
        read(model, recording, MORE)
