"""Plugins that break the contract of their interface are stopped, by name and layer, before harm is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rdkv
from rdkv.runtime.errors import BudgetError, PluginError

MakeCache = Callable[..., "rdkv.CompressedCache"]
PROMPT = torch.arange(3, 123)[None]
LATER = "return lambda: self.pack(keys, values, plan)"  # as a format on a GPU

PLUGIN = """
from itertools import count as counter
import torch
from rdkv import Allocator, BitPlan, CacheFormat, RdkvError, Scorer, Scores, hookimpl
from rdkv.runtime.registry import load_registry

calls = counter()
count = lambda: next(calls)

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

    def begin(self, keys, values, plan):
        {begin}
        return super().begin(keys, values, plan)

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
def make_cache(model: Any, tmp_path: Path) -> MakeCache:
    """A cache with a plugin that does what it should but for the given statements."""

    def make(**settings: Any) -> rdkv.CompressedCache:
        statements = {name: settings.pop(name, "pass") for name in ("score", "allocate", "pack", "begin")}
        path = tmp_path / "bad_plugin.py"
        path.write_text(PLUGIN.format(**statements))
        config = rdkv.CompressionConfig(budget=0.3, plugins=(str(path),), **settings)
        return rdkv.CompressedCache(model.config, config)

    return make


@pytest.fixture
def generate(model: Any, make_cache: MakeCache) -> MakeCache:
    """The same, once it has been generated with."""

    def run(**settings: Any) -> rdkv.CompressedCache:
        cache = make_cache(**settings)
        model.generate(PROMPT, past_key_values=cache, max_new_tokens=2, do_sample=False, pad_token_id=0)
        return cache

    return run


def refused(error: pytest.ExceptionInfo[Exception], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def test_the_plugin_itself_works(generate: MakeCache) -> None:
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
def test_scorer(score: str, words: list[str], generate: MakeCache) -> None:
    with pytest.raises(PluginError) as error:
        generate(score=score, scorer="bad")
    refused(error, "scorer 'bad'", "layer 0", *words)


def test_scorer_is_named_with_the_layer_at_fault(generate: MakeCache) -> None:
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
def test_allocator(allocate: str, words: list[str], generate: MakeCache) -> None:
    with pytest.raises(PluginError) as error:
        generate(allocate=allocate, scorer="snapkv", allocator="bad")
    refused(error, "allocator 'bad'", "layer 0", *words)


def test_error_of_an_allocator_is_named(generate: MakeCache) -> None:
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
def test_format(pack: str, words: list[str], generate: MakeCache) -> None:
    with pytest.raises(PluginError) as error:
        generate(pack=pack, scorer="snapkv", format="bad")
    refused(error, "format 'bad'", "layer 0", *words)


@pytest.mark.parametrize("begin", ["pass", LATER])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("plugin", "statements", "word"),
    [
        ("scorer", {"score": "token = token - 2 * (observation.layer == LAYER)"}, "negative"),
        ("allocator", {"allocate": "value_bits[..., 0] = 3 * (count() == LAYER)"}, "3 bits"),
        ("format", {"pack": "segment = None if count() == LAYER else segment"}, "NoneType"),
        ("format", {"pack": "assert count() != LAYER, 'no more'"}, "no more"),
    ],
)
def test_what_a_plugin_does_to_a_layer_fails_the_prompts_pass(
    begin: str, layer: int, plugin: str, statements: dict[str, str], word: str, model: Any, make_cache: MakeCache
) -> None:
    lines = {name: line.replace("LAYER", str(layer)) for name, line in statements.items()}
    settings = {"scorer": "snapkv", "format": "bad"} | {plugin: "bad"}
    cache = make_cache(begin=begin, **lines, **settings)
    with pytest.raises(PluginError) as error, torch.no_grad():
        model(PROMPT, past_key_values=cache)
    refused(error, f"{plugin} 'bad', layer {layer}", word)
    assert cache.get_seq_length() == 0


def test_whoever_made_a_bad_plan_is_to_blame(generate: MakeCache) -> None:
    """And not the format, which cannot pack it."""
    allocate = "value_bits[..., 0] = 3"
    for begin in ("raise ValueError('what is this?')", "return lambda: 1 / 0"):
        with pytest.raises(PluginError) as error:
            generate(allocate=allocate, begin=begin, scorer="snapkv", allocator="bad", format="bad")
        refused(error, "allocator 'bad'", "layer 0", "3 bits")
