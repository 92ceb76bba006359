"""Plugins that break the contract of their interface are stopped, by name and layer, before harm is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rdkv
from rdkv.runtime.errors import BudgetError, PluginError

Generate = Callable[..., "rdkv.CompressedCache"]

PLUGIN = """
import torch
from rdkv import Allocator, BitPlan, CacheFormat, RdkvError, Scorer, Scores, hookimpl
from rdkv.runtime.registry import load_registry

class Bad(Scorer):
    def score(self, observation):
        keys = observation.keys
        token, channel, pinned = torch.ones(keys.shape[:3]), torch.ones(*keys.shape[:2], keys.shape[3]), None
        {score}
        return Scores(token, channel, pinned)

class BadAllocator(Allocator):
    def allocate(self, scores, ladder, budget):
        value_bits = torch.zeros(scores.token.shape, dtype=torch.uint8)
        key_bits = torch.zeros(scores.channel.shape, dtype=torch.uint8)
        pinned = torch.zeros(scores.token.shape, dtype=torch.bool)
        {allocate}
        return BitPlan(value_bits, key_bits, pinned)

class BadFormat(CacheFormat):
    def __init__(self, options=None):
        super().__init__(options)
        self.good = load_registry().format("mixed-bit")

    def ladder(self, head_dim, tokens, distortion=None):
        return self.good.ladder(head_dim, tokens, distortion)

    def pack(self, keys, values, plan):
        segment = self.good.pack(keys, values, plan)
        {pack}
        return segment

@hookimpl
def rdkv_scorers():
    return {{"bad": Bad}}

@hookimpl
def rdkv_allocators():
    return {{"bad": BadAllocator}}

@hookimpl
def rdkv_formats():
    return {{"bad": BadFormat}}
"""


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    return rdkv.attach(tiny_model("llama", dtype=torch.bfloat16))


@pytest.fixture
def generate(model: Any, tmp_path: Path) -> Generate:
    """Generate with a plugin that does what it should but for the given statements."""

    def run(score: str = "pass", allocate: str = "pass", pack: str = "pass", **settings: Any) -> rdkv.CompressedCache:
        path = tmp_path / "bad_plugin.py"
        path.write_text(PLUGIN.format(score=score, allocate=allocate, pack=pack))
        config = rdkv.CompressionConfig(budget=0.3, plugins=(str(path),), **settings)
        cache = rdkv.CompressedCache(model.config, config)
        prompt = torch.arange(3, 123)[None]
        model.generate(prompt, past_key_values=cache, max_new_tokens=2, do_sample=False, pad_token_id=0)
        return cache

    return run


def refused(error: pytest.ExceptionInfo[Exception], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def test_the_plugin_itself_works(generate: Generate) -> None:
    assert 0 < generate(scorer="bad").retention <= 0.3
    assert 0 < generate(scorer="bad", format="bad").retention <= 0.3
    assert generate(scorer="bad", allocator="bad").retention == 0


@pytest.mark.parametrize(
    ("score", "words"),
    [
        ("token = token[..., :-1]", ["token", "[1, 2, 119]", "[1, 2, 120]"]),
        ("token = token[0]", ["token", "[2, 120]"]),
        ("channel = channel.mT", ["channel", "[1, 16, 2]", "[1, 2, 16]"]),
        ("token[0, 1, 3] = float('nan')", ["token", "NaN"]),
        ("channel[0, 1, 3] = float('inf')", ["channel", "infinite"]),
        ("token[0, 0, 0] = -1", ["token", "negative", "-1"]),
        ("token = token.double()", ["token", "float64"]),
        ("token = token.to('meta')", ["token", "meta", "cpu"]),
        ("token = token.tolist()", ["token", "list"]),
        ("pinned = token", ["pinned", "float32", "bool"]),
        ("pinned = token[..., :-1] > 0", ["pinned", "[1, 2, 119]"]),
        ("return token, channel", ["tuple", "Scores"]),
        ("return None", ["NoneType", "Scores"]),
    ],
)
def test_scorer(score: str, words: list[str], generate: Generate) -> None:
    with pytest.raises(PluginError) as error:
        generate(score=score, scorer="bad")
    refused(error, "scorer 'bad'", "layer 0", *words)


def test_scorer_is_named_with_the_layer_at_fault(generate: Generate) -> None:
    with pytest.raises(PluginError) as error:
        generate(score="token = token * (-1) ** observation.layer", scorer="bad")
    refused(error, "scorer 'bad'", "layer 1", "negative")


@pytest.mark.parametrize(
    ("allocate", "words"),
    [
        ("value_bits += 16", ["overspends", "bytes"]),
        ("pinned[..., :60] = True", ["overspends", "bytes"]),
        ("value_bits[..., 0] = 3", ["value_bits", "3 bits", "(0, 2, 4, 8, 16)"]),
        ("key_bits[..., 0] = 32", ["key_bits", "32 bits"]),
        ("value_bits = value_bits[..., 1:]", ["value_bits", "[1, 2, 119]"]),
        ("key_bits = key_bits.long()", ["key_bits", "int64", "uint8"]),
        ("return value_bits", ["Tensor", "BitPlan"]),
    ],
)
def test_allocator(allocate: str, words: list[str], generate: Generate) -> None:
    with pytest.raises(PluginError) as error:
        generate(allocate=allocate, scorer="snapkv", allocator="bad")
    refused(error, "allocator 'bad'", "layer 0", *words)


def test_error_of_an_allocator_is_named(generate: Generate) -> None:
    with pytest.raises(BudgetError) as error:
        generate(allocate="from rdkv.runtime.errors import BudgetError; raise BudgetError('no room')", allocator="bad")
    refused(error, "allocator 'bad'", "layer 0", "no room")


@pytest.mark.parametrize(
    ("pack", "words"),
    [
        ("kept = segment.tensors; segment.__dict__['tensors'] = lambda: [*kept(), torch.zeros(9999)]", ["holds"]),
        ("return None", ["NoneType"]),
    ],
)
def test_format(pack: str, words: list[str], generate: Generate) -> None:
    with pytest.raises(PluginError) as error:
        generate(pack=pack, scorer="snapkv", format="bad")
    refused(error, "format 'bad'", "layer 0", *words)
