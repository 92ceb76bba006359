"""How long a layer's 16-bit keys and values live, and that nothing outlives its cache.

On a GPU a layer is packed when the next one has its keys and values, so that those of two layers exist for a moment,
and of one through the MLP; elsewhere, and where nothing is to be packed, a layer's are gone before its MLP runs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import LAYERS, forward, new_cache, padding, prefill, random_qkv, reachable_tensors, storage_bytes
from torch import Tensor
from torch.multiprocessing import reductions

import rdkv
from rdkv.runtime.layer import CompressedLayer

StorageWeakRef: Any = reductions.StorageWeakRef  # torch leaves it untyped
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"]
LENGTHS = [40, 33, 20]
IDS = torch.randint(3, 259, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_garbage_collector() -> Iterator[None]:
    """Reference counts alone must do: the collector runs when it likes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class WatchedCache(rdkv.CompressedCache):
    """A cache that looks which of the prompt's tensors still exist whenever it is given the next layer's.

    Attributes:
        alive, left: how many of the layers before, when it is given them, and once it has taken them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: list[Any] = []
        self.alive: list[int] = []
        self.left: list[int] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.alive.append(self.count())
        taken = super().update(key_states, value_states, *args, **kwargs)
        self.left.append(self.count())
        self.given += [StorageWeakRef(t.untyped_storage()) for t in (key_states, value_states)]
        return taken

    def count(self) -> int:
        """Storages of the prompt's keys and values that exist."""
        return sum(not ref.expired() for ref in self.given)


def run(model: Any, budget: float, mask: Tensor | None = None, **settings: Any) -> WatchedCache:
    rdkv.attach(model)
    cache = WatchedCache(model.config, rdkv.CompressionConfig(budget=budget, **settings))
    with torch.no_grad():
        model(IDS, attention_mask=mask, past_key_values=cache)
    return cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, padding(LENGTHS).long()], ids=["whole", "padded"])
def test_keys_and_values_are_gone_when_the_next_layer_runs(
    family: str, dtype: torch.dtype, mask: Tensor | None, tiny_model: Callable[..., Any]
) -> None:
    cache = run(tiny_model(family, dtype, num_hidden_layers=4), 0.1, mask)
    assert len(cache.given) == 8
    assert cache.alive == [0, 0, 0, 0]
    assert cache.count() == 0


@pytest.mark.parametrize("budget", [0.001, 0.1, 0.9, 1.0])
def test_of_two_layers_at_most_where_packing_is_finished_later(
    budget: float, late: None, tiny_model: Callable[..., Any]
) -> None:
    cache = run(tiny_model("llama", torch.bfloat16, num_hidden_layers=4), budget)
    assert cache.alive == ([0, 2, 2, 2] if budget < 1 else [0, 0, 0, 0])
    assert cache.left == [0, 0, 0, 0]
    assert cache.count() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_of_two_layers_at_most_on_a_gpu(tiny_model: Callable[..., Any]) -> None:
    model = rdkv.attach(tiny_model("llama", torch.bfloat16, num_hidden_layers=4).to("cuda"))
    cache = WatchedCache(model.config, rdkv.CompressionConfig(budget=0.1))
    with torch.no_grad():
        model(IDS.to("cuda"), past_key_values=cache)
    assert cache.alive == [0, 2, 2, 2]
    assert cache.left == [0, 0, 0, 0]
    assert cache.count() == 0


def test_bytes_of_a_layer_that_is_being_packed(late: None) -> None:
    cache = new_cache(0.1)
    cache.session.keep_scores = False
    qkv = random_qkv(3, 40, dtype=torch.bfloat16)
    prompt = 2 * qkv[1].numel() * 2
    forward(cache, 0, qkv, padding(LENGTHS))
    packing = [tensor for tensor in reachable_tensors(cache.session) if tensor.dtype == torch.bfloat16]
    assert 0.7 * prompt < storage_bytes(iter(packing)) < prompt  # of the real tokens
    forward(cache, 1, qkv, padding(LENGTHS))
    assert storage_bytes(reachable_tensors(cache)) == cache.nbytes < 0.3 * prompt


@pytest.mark.parametrize("allocator", ["waterfill", "eviction"])
@pytest.mark.parametrize("scope", ["head", "layer"])
@pytest.mark.parametrize("budget", [0.001, 0.1, 0.9, 1.0])
def test_whatever_the_plan(allocator: str, scope: str, budget: float, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", torch.bfloat16)
    cache = run(model, budget, allocator=allocator, allocator_options={"scope": scope})
    assert cache.alive == [0, 0]
    assert cache.count() == 0


def test_scorers_and_kept_scores(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", torch.bfloat16)
    for scorer in ("attention-distortion", "snapkv", "key-norm", "streaming", "expected-attention", "random"):
        rdkv.attach(model)
        cache = WatchedCache(model.config, rdkv.CompressionConfig(budget=0.2, scorer=scorer), keep_scores=True)
        with torch.no_grad():
            model(IDS, past_key_values=cache)
        assert cache.alive == [0, 0], scorer
        assert cache.count() == 0, scorer


@pytest.mark.parametrize("mask", [None, padding(LENGTHS).long()], ids=["whole", "padded"])
def test_whole_model_holds_every_layer_until_the_last(mask: Tensor | None, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=4)
    cache = run(model, 0.1, mask, allocator_options={"scope": "model"})
    # Padded sequences are waited for as they were cut out of the batch; the test below counts those.
    assert cache.alive == ([0, 2, 4, 6] if mask is None else [0, 0, 0, 0])
    assert cache.count() == 0


def test_whole_model_drops_its_layers_one_by_one(
    monkeypatch: pytest.MonkeyPatch, late: None, tiny_model: Callable[..., Any]
) -> None:
    stored: list[int] = []
    store, model = CompressedLayer.store, rdkv.attach(tiny_model("llama", torch.bfloat16, num_hidden_layers=4))
    cache = WatchedCache(model.config, rdkv.CompressionConfig(budget=0.1, allocator_options={"scope": "model"}))

    def watched(layer: CompressedLayer, *arguments: Any) -> None:
        stored.append(cache.count())
        store(layer, *arguments)

    monkeypatch.setattr(CompressedLayer, "store", watched)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    assert stored == [8, 6, 4, 2]  # the last layer's are the model's own until it returns


def test_bytes_that_wait_for_the_whole_model() -> None:
    cache = new_cache(0.1, allocator_options={"scope": "model"})
    cache.session.keep_scores = False
    qkv = random_qkv(3, 40, dtype=torch.bfloat16)
    prompt = 2 * qkv[1].numel() * 2
    forward(cache, 0, qkv, padding(LENGTHS))
    waiting = [tensor for tensor in reachable_tensors(cache.session.waiting) if tensor.dtype == torch.bfloat16]
    assert 0.7 * prompt < storage_bytes(iter(waiting)) < prompt
    forward(cache, 1, qkv, padding(LENGTHS))
    assert storage_bytes(reachable_tensors(cache)) == cache.nbytes < 0.3 * prompt


@pytest.mark.parametrize("budget", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("scope", ["head", "model"])
def test_deleted_cache_frees_its_tensors(budget: float, scope: str, tiny_model: Callable[..., Any]) -> None:
    model: Any = rdkv.attach(tiny_model("llama"))
    config = rdkv.CompressionConfig(budget=budget, allocator_options={"scope": scope})
    cache = rdkv.CompressedCache(model.config, config, keep_scores=True)
    model.generate(IDS, attention_mask=padding(LENGTHS).long(), past_key_values=cache, max_new_tokens=3)
    refs = [StorageWeakRef(tensor.untyped_storage()) for tensor in reachable_tensors(cache)]
    assert refs
    assert not any(ref.expired() for ref in refs)
    del cache
    assert all(ref.expired() for ref in refs)


def test_reset_frees_the_tensors() -> None:
    cache = new_cache(0.3)
    prefill(cache, random_qkv(3, 40), padding(LENGTHS))
    refs = [StorageWeakRef(tensor.untyped_storage()) for tensor in reachable_tensors(cache)]
    assert len(refs) > LAYERS
    cache.reset()
    assert all(ref.expired() for ref in refs)
    assert not list(reachable_tensors(cache))


def test_caller_that_records_a_graph_holds_it_alone(tiny_model: Callable[..., Any]) -> None:
    model: Any = rdkv.attach(tiny_model("llama", torch.bfloat16))
    cache = WatchedCache(model.config, rdkv.CompressionConfig(budget=0.1))
    output = model(IDS, past_key_values=cache)
    assert cache.count() > 0
    del output
    assert cache.count() == 0
