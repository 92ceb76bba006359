"""What layers share: groups of one length, one budget for the whole model, layers that wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import (
    HEADS,
    LAYERS,
    QKV,
    TOKEN_BYTES,
    forward,
    layer_of,
    new_cache,
    padding,
    prefill,
    random_qkv,
    reachable_tensors,
)
from torch import Tensor

import rdkv
from rdkv.runtime.errors import PluginError, RdkvError, UnsupportedModelError

SCOPES = ["head", "layer", "model"]
LENGTHS = [60, 23, 60, 41]
READS: dict[str, Callable[[rdkv.CompressedCache], Any]] = {
    "nbytes": lambda cache: cache.nbytes,
    "layer_nbytes": lambda cache: cache.layer_nbytes(0),
    "full_nbytes": lambda cache: cache.full_nbytes,
    "prompt_nbytes": lambda cache: cache.prompt_nbytes,
    "prompt_full_nbytes": lambda cache: cache.prompt_full_nbytes,
    "retention": lambda cache: cache.retention,
    "plan": lambda cache: cache.plan(0).value_bits.tolist(),
    "tensors": lambda cache: [tensor.tolist() for tensor in cache.tensors()],
    "compress_seconds": lambda cache: cache.compress_seconds > 0,
}


def segment_bytes(cache: rdkv.CompressedCache) -> list[int]:
    """Bytes of each layer's prompt."""
    return [cache.layer_nbytes(layer) for layer in range(LAYERS)]


def layers_apart(cache: rdkv.CompressedCache, contrast: float) -> list[Tensor]:
    """A prompt whose attention is flat in the first layer, and as much sharper in the last as asked."""
    query, keys, values = random_qkv(1, 120)
    return [forward(cache, layer, (query * contrast**layer, keys, values)) for layer in range(LAYERS)]


def test_groups_are_sequences_of_one_length() -> None:
    session = new_cache().session
    keys = torch.zeros(4, HEADS, 60, 1)
    groups = session.groups(padding(LENGTHS), keys)
    assert [(group.rows, group.start) for group in groups] == [([0, 2], 0), ([3], 19), ([1], 37)]
    assert session.prompt_lengths == LENGTHS
    (whole,) = session.groups(None, keys)
    assert (whole.rows, whole.start) == ([0, 1, 2, 3], 0)


def test_layers_of_a_pass_share_what_was_read_of_their_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    session, keys, mask = new_cache().session, torch.zeros(4, HEADS, 60, 1), padding(LENGTHS)
    groups = session.groups(mask, keys)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", lambda _: pytest.fail("the device was asked again"))
        assert session.groups(mask, keys) == groups
    assert session.groups(mask.roll(1, 0), keys) != groups
    session.reset()
    assert session.padding is None


def test_longest_sequence_decides_about_the_window() -> None:
    session = new_cache().session
    session.groups(padding([512, 3]), torch.zeros(2, HEADS, 512, 1))
    session.groups(torch.arange(600).expand(2, -1) >= 100, torch.zeros(2, HEADS, 600, 1))
    with pytest.raises(UnsupportedModelError, match=r"513 .* 512"):
        session.groups(padding([513, 3]), torch.zeros(2, HEADS, 513, 1))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("allocator", ["waterfill", "eviction"])
def test_bytes_stay_within_the_budget(scope: str, budget: float, allocator: str) -> None:
    lengths = [4 * length for length in LENGTHS]  # long enough that a block of tokens is a small part
    cache = new_cache(budget, allocator=allocator, allocator_options={"scope": scope})
    prefill(cache, random_qkv(4, 240), padding(lengths))
    full = sum(lengths) * TOKEN_BYTES
    if scope != "model":
        assert max(segment_bytes(cache)) <= budget * full
    assert sum(segment_bytes(cache)) <= budget * full * LAYERS
    assert sum(segment_bytes(cache)) > 0.9 * budget * full * LAYERS or budget == 0.05
    assert cache.retention <= budget


def test_whole_model_moves_bytes_between_layers() -> None:
    budget = 0.2
    share = budget * 120 * TOKEN_BYTES
    apart, together = (new_cache(budget, allocator_options={"scope": scope}) for scope in ("layer", "model"))
    for cache in (apart, together):
        layers_apart(cache, contrast=4.0)
    assert max(segment_bytes(apart)) <= share
    assert max(segment_bytes(together)) > share
    assert sum(segment_bytes(together)) <= 2 * share


def test_equal_layers_get_equal_shares() -> None:
    query, keys, values = (t[:, :1].expand(-1, t.shape[1], -1, -1) for t in random_qkv(1, 480))
    caches = [new_cache(0.2, allocator_options={"scope": scope}) for scope in SCOPES]
    for cache in caches:
        prefill(cache, (query, keys, values))
    first = caches[0].plan(0)
    for cache in caches:
        for layer in range(LAYERS):
            plan = cache.plan(layer)
            # What is left of a shared budget buys a block of tokens a few more bits here or there.
            assert (plan.value_bits != first.value_bits).float().mean() < 0.05
            assert torch.equal(plan.pinned, first.pinned)


def test_whole_model_packs_when_the_last_layer_is_scored() -> None:
    cache = new_cache(0.3, allocator_options={"scope": "model"})
    qkv = random_qkv(4, 60)
    forward(cache, 0, qkv, padding(LENGTHS))
    assert not layer_of(cache, 0).segments
    assert cache.nbytes == 0
    assert len(cache.session.waiting) == 1
    with pytest.raises(RdkvError, match="no prompt yet"):
        cache.plan(0)
    forward(cache, 1, qkv, padding(LENGTHS))
    assert layer_of(cache, 0).segments
    assert not cache.session.waiting
    assert cache.plan(0).value_bits.shape == (4, HEADS, 60)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("lengths", [[60], LENGTHS])
def test_packing_later_gives_the_same(scope: str, lengths: list[int], request: pytest.FixtureRequest) -> None:
    caches = []
    for fixture in (None, "late"):
        if fixture:
            request.getfixturevalue(fixture)
        cache = new_cache(allocator_options={"scope": scope})
        outputs = prefill(cache, random_qkv(len(lengths), 60), padding(lengths))
        caches.append((cache, outputs))
        assert cache.session.packing is None
        assert not cache.session.underway
    (at_once, expected), (later, outputs) = caches
    assert all(map(torch.equal, outputs, expected))
    assert same(later, at_once)


def test_a_layer_is_finished_when_the_next_one_has_its_keys(late: None) -> None:
    cache, (query, keys, values) = new_cache(), random_qkv(4, 60)
    forward(cache, 0, (query, keys, values), padding(LENGTHS))
    assert cache.session.packing is not None
    assert not layer_of(cache, 0).segments
    assert cache.get_seq_length() == 60
    cache.update(keys, values, 1)
    assert cache.session.packing is None
    assert layer_of(cache, 0).segments


@pytest.mark.parametrize("name", READS)
def test_whoever_asks_sees_finished_layers(name: str, request: pytest.FixtureRequest) -> None:
    seen = []
    for fixture in (None, "late"):
        if fixture:
            request.getfixturevalue(fixture)
        cache = new_cache()
        forward(cache, 0, random_qkv(4, 60), padding(LENGTHS))
        seen.append(READS[name](cache))
        assert layer_of(cache, 0).segments
        assert cache.session.packing is None
    assert seen[0] == seen[1]
    forward(cache, 1, random_qkv(4, 60), padding(LENGTHS))
    assert cache.get_seq_length(1) == 60


def test_what_is_wrong_with_a_layer_comes_out_in_the_prompts_pass(late: None) -> None:
    used, fresh = new_cache(), new_cache()
    qkv = random_qkv(1, 60)
    bad: QKV = (qkv[0], qkv[1], torch.full_like(qkv[2], float("nan")))
    for bad_layer in range(LAYERS):
        with pytest.raises(PluginError, match=f"format 'mixed-bit', layer {bad_layer}: values are not finite"):
            _ = [forward(used, layer, bad if layer == bad_layer else qkv) for layer in range(LAYERS)]
        assert used.session.failed
        assert used.get_seq_length() == 0
    forward(used, 0, bad)
    with pytest.raises(PluginError, match="layer 0: values"):
        used.layer_nbytes(0)
    for cache in (used, fresh):
        prefill(cache, qkv)
    assert same(used, fresh)


@pytest.mark.parametrize("scope", SCOPES)
def test_pass_that_ends_early_is_noticed(scope: str, late: None) -> None:
    """Whatever ended it, such as memory that ran out in an MLP, was no concern of the cache."""
    used, fresh = (new_cache(allocator_options={"scope": scope}) for _ in range(2))
    forward(used, 0, random_qkv(1, 60))
    assert used.get_seq_length() == 60
    with pytest.raises(RdkvError, match="before its last layer"):
        forward(used, 0, random_qkv(1, 1))
    assert used.get_seq_length() == 0
    for cache in (used, fresh):
        prefill(cache, random_qkv(1, 60, seed=1))
    assert same(used, fresh)


def test_scores_are_kept_if_asked_for() -> None:
    cache = new_cache()
    prefill(cache, random_qkv(4, 60), padding(LENGTHS))
    for layer in range(LAYERS):
        assert [tuple(s.token.shape) for s in cache.scores(layer)] == [(2, HEADS, 60), (1, HEADS, 41), (1, HEADS, 23)]
    lean = rdkv.CompressedCache(cache.model_config, rdkv.CompressionConfig(budget=0.3))
    prefill(lean, random_qkv(1, 60))
    assert not lean.session.scores


def test_seconds_add_up() -> None:
    cache = new_cache()
    assert cache.compress_seconds == 0
    seen = []
    for layer in range(LAYERS):
        forward(cache, layer, random_qkv(1, 60))
        seen.append(cache.compress_seconds)
    assert 0 < seen[0] < seen[1]
    forward(cache, 0, random_qkv(1, 1))
    assert cache.compress_seconds == seen[1]


def test_seconds_are_of_compression_alone(late: None) -> None:
    cache, qkv = new_cache(), random_qkv(1, 60)
    prefill(cache, qkv)
    cache.reset()
    begin = time.perf_counter()
    forward(cache, 0, qkv)
    begun = cache.session.stopwatch.seconds
    time.sleep(1)  # the layer's MLP
    forward(cache, 1, qkv)
    assert begun > 0
    assert begun < cache.compress_seconds < time.perf_counter() - begin - 1


def same(first: rdkv.CompressedCache, second: rdkv.CompressedCache) -> bool:
    pairs = list(zip(first.tensors(), second.tensors(), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


def test_reset_drops_what_is_being_packed(late: None) -> None:
    cache = new_cache()
    forward(cache, 0, random_qkv(1, 60))
    cache.reset()
    assert cache.session.packing is None
    assert cache.nbytes == cache.get_seq_length() == 0
    assert not list(reachable_tensors(cache))


@pytest.mark.parametrize("scope", SCOPES)
def test_reset_makes_a_cache_as_new(scope: str) -> None:
    used, fresh = (new_cache(allocator_options={"scope": scope}) for _ in range(2))
    prefill(used, random_qkv(2, 40, seed=1))
    forward(used, 0, random_qkv(2, 3, seed=2))
    used.reset()
    assert used.nbytes == used.full_nbytes == used.get_seq_length() == 0
    assert used.retention == 1.0
    for cache in (used, fresh):
        prefill(cache, random_qkv(4, 60), padding(LENGTHS))
    assert same(used, fresh)
    assert used.session.prompt_lengths == fresh.session.prompt_lengths


@pytest.mark.parametrize("scope", SCOPES)
def test_error_in_a_later_layer_leaves_no_half_of_a_prompt(scope: str) -> None:
    used, fresh = (new_cache(allocator_options={"scope": scope}) for _ in range(2))
    qkv = random_qkv(1, 60)
    bad: QKV = (qkv[0], qkv[1], torch.full_like(qkv[2], float("nan")))
    forward(used, 0, qkv)
    with pytest.raises(RdkvError):
        forward(used, 1, bad)
    assert used.session.packing is None
    assert not used.session.waiting
    assert used.get_seq_length() == 0
    for cache in (used, fresh):
        prefill(cache, qkv)
    assert same(used, fresh)
