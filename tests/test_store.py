"""Saved caches: what comes back is what went in, to the bit; nothing half-written, nothing overwritten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import padding
from torch import Tensor

import rdkv

IDS = torch.randint(3, 259, (3, 60), generator=torch.Generator().manual_seed(0))
LENGTHS = [60, 23, 41]
MASK = padding(LENGTHS).long()

TinyModel = Callable[..., Any]


def fill(
    model: Any, ids: Tensor, mask: Tensor | None = None, budget: float = 0.3, **settings: Any
) -> rdkv.CompressedCache:
    """A cache with a prompt in it."""
    cache = rdkv.CompressedCache(rdkv.attach(model).config, rdkv.CompressionConfig(budget=budget, **settings))
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def logits(model: Any, cache: rdkv.CompressedCache, mask: Tensor | None = None, steps: int = 3) -> Tensor:
    """Of a question of a few tokens and single tokens after it, each row's own; ``[B, n, V]``."""
    batch = len(cache.prompt_lengths)
    made = []
    for step in range(steps):
        ids = torch.arange(batch * (4 if step == 0 else 1)).reshape(batch, -1) + 10 * step + 5
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
        with torch.no_grad():
            made.append(model(ids, attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(made, 1)


def same(a: rdkv.CompressedCache, b: rdkv.CompressedCache) -> bool:
    """Whether two caches hold the same tensors in the same order."""
    pairs = list(zip(a.tensors(), b.tensors(), strict=True))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [0.001, 0.1, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_a_loaded_cache_is_the_saved_one(
    tiny_model: TinyModel, tmp_path: Path, dtype: torch.dtype, budget: float, mask: Tensor | None
) -> None:
    model = tiny_model("llama", dtype)
    cache = fill(model, IDS, mask, budget)
    rdkv.save(cache, tmp_path / "doc.rdkv", model, IDS)
    loaded = rdkv.load(tmp_path / "doc.rdkv", model)
    assert same(cache, loaded)
    assert (loaded.nbytes, loaded.prompt_nbytes, loaded.prompt_full_nbytes) == (
        cache.nbytes, cache.prompt_nbytes, cache.prompt_full_nbytes,
    )  # fmt: skip
    assert loaded.prompt_lengths == cache.prompt_lengths == tuple(LENGTHS if mask is not None else [60] * 3)
    assert loaded.bits == cache.bits
    assert loaded.get_seq_length() == 60
    assert torch.equal(logits(model, loaded, mask), logits(model, cache, mask))
    assert loaded.nbytes == cache.nbytes


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3", "smollm3"])
def test_families(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    cache = fill(model, IDS, MASK)
    rdkv.save(cache, tmp_path / "doc.rdkv", model, IDS)
    loaded = rdkv.load(tmp_path / "doc.rdkv", model)
    assert torch.equal(logits(model, loaded, MASK), logits(model, cache, MASK))


@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_tokens_after_the_prompt(tiny_model: TinyModel, tmp_path: Path, budget: float, mask: Tensor | None) -> None:
    model = tiny_model("llama")
    cache = fill(model, IDS, mask, budget)
    ids = torch.cat([IDS.repeat(1, 6), IDS[:, :1]], 1)  # later tokens fill more than the first buffer
    whole = None if mask is None else torch.cat([mask, torch.ones(3, 300, dtype=torch.long)], 1)
    with torch.no_grad():
        model(ids[:, 60:360], attention_mask=whole, past_key_values=cache)
    rdkv.save(cache, tmp_path / "doc.rdkv", model, ids)
    loaded = rdkv.load(tmp_path / "doc.rdkv", model)
    assert loaded.token_ids is not None
    assert torch.equal(loaded.token_ids, ids[:, :360])  # one more was given than the cache has read
    assert loaded.get_seq_length() == cache.get_seq_length() == 360
    assert (loaded.prompt_full_nbytes, loaded.full_nbytes) == (cache.prompt_full_nbytes, cache.full_nbytes)
    assert torch.equal(logits(model, loaded, whole), logits(model, cache, whole))
    assert loaded.nbytes == cache.nbytes


def test_generate_goes_on_from_a_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    question = torch.arange(50, 57)[None]
    rdkv.save(fill(model, IDS[:1]), tmp_path / "doc.rdkv", model, IDS[:1])
    answers = []
    for cache in (fill(model, IDS[:1]), rdkv.load(tmp_path / "doc.rdkv", model)):
        ids = torch.cat([IDS[:1] if cache.token_ids is None else cache.token_ids, question], 1)
        answers.append(model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0))
    assert torch.equal(*answers)


def test_a_file_serves_any_number_of_times(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    rdkv.save(fill(model, IDS), tmp_path / "a.rdkv", model, IDS)
    first = rdkv.load(tmp_path / "a.rdkv", model)
    rdkv.save(first, tmp_path / "b.rdkv", model, first.token_ids)
    expected = logits(model, first)
    for name in ("a.rdkv", "b.rdkv"):
        assert torch.equal(logits(model, rdkv.load(tmp_path / name, model)), expected)


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_forks_of_a_loaded_cache(tiny_model: TinyModel, tmp_path: Path, budget: float) -> None:
    model = tiny_model("llama")
    cache = fill(model, IDS, MASK, budget)
    expected = logits(model, cache.fork(), MASK)
    with torch.no_grad():
        model(IDS[:, :7], attention_mask=torch.cat([MASK, MASK[:, -7:]], 1), past_key_values=cache)
    rdkv.save(cache, tmp_path / "doc.rdkv", model, torch.cat([IDS, IDS], 1))
    loaded = rdkv.load(tmp_path / "doc.rdkv", model)
    for _ in range(2):
        fork = loaded.fork()
        assert fork.token_ids is not None
        assert torch.equal(fork.token_ids, IDS)  # without the tokens after the prompt
        assert torch.equal(logits(model, fork, MASK), expected)
    assert loaded.get_seq_length() == 67
    rdkv.save(fork, tmp_path / "fork.rdkv", model, torch.cat([IDS, IDS], 1))
    assert rdkv.load(tmp_path / "fork.rdkv", model).get_seq_length() == 66


def test_a_loaded_cache_can_be_emptied_and_filled_anew(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    rdkv.save(fill(model, IDS[:1]), tmp_path / "doc.rdkv", model, IDS[:1])
    loaded, other = rdkv.load(tmp_path / "doc.rdkv", model), fill(model, IDS[1:])
    loaded.reset()
    assert loaded.token_ids is None
    with torch.no_grad():
        model(IDS[1:], past_key_values=loaded)
    assert same(loaded, other)


def test_positions_that_were_not_kept(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache = fill(model, IDS, format_options={"positions": "no"})
    rdkv.save(cache, tmp_path / "doc.rdkv", model, IDS)
    loaded = rdkv.load(tmp_path / "doc.rdkv", model)
    assert same(cache, loaded)
    with pytest.raises(rdkv.ConfigError, match="the plan was not kept"):
        loaded.plan(0)


def test_scores_are_not_in_a_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    rdkv.save(fill(model, IDS), tmp_path / "doc.rdkv", model, IDS)
    with pytest.raises(rdkv.RdkvError, match=r"layer 1 has no scores: .* not in a file"):
        rdkv.load(tmp_path / "doc.rdkv", model).scores(1)


def test_triton_reads_what_was_loaded(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=1)
    ids, mask = IDS[:2, :20], padding([20, 12]).long()
    cache = fill(model, ids, mask, backend="triton")
    rdkv.save(cache, tmp_path / "doc.rdkv", model, ids)
    loaded = rdkv.load(tmp_path / "doc.rdkv", model, backend="triton")
    assert torch.equal(logits(model, loaded, mask, 2), logits(model, cache, mask, 2))


def test_existing_files_are_kept(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache, path = fill(model, IDS), tmp_path / "doc.rdkv"
    path.write_text("mine")
    with pytest.raises(rdkv.ConfigError, match=r"doc\.rdkv exists; give another name, or overwrite it"):
        rdkv.save(cache, path, model, IDS)
    assert path.read_text() == "mine"
    rdkv.save(cache, str(path), model, IDS, overwrite=True)
    assert same(rdkv.load(str(path), model), cache)
    assert [entry.name for entry in tmp_path.iterdir()] == ["doc.rdkv"]


def test_what_cannot_be_saved(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache, path = fill(model, IDS), tmp_path / "doc.rdkv"
    with pytest.raises(rdkv.ConfigError, match="it is a folder"):
        rdkv.save(cache, tmp_path, model, IDS)
    with pytest.raises(rdkv.ConfigError, match="there is no folder"):
        rdkv.save(cache, tmp_path / "none" / "doc.rdkv", model, IDS)
    for ids in (IDS[:, 1:], IDS[:2], IDS[0], IDS.float()):
        with pytest.raises(rdkv.ConfigError, match="the cache holds 3 sequences of 60 tokens"):
            rdkv.save(cache, path, model, ids)
    with pytest.raises(rdkv.ConfigError, match="was not made for this model"):
        rdkv.save(cache, path, tiny_model("llama", num_hidden_layers=3), IDS)
    empty = rdkv.CompressedCache(model.config, rdkv.CompressionConfig(budget=0.3))
    with pytest.raises(rdkv.RdkvError, match="the cache holds no prompt yet"):
        rdkv.save(empty, path, model, IDS)
    assert list(tmp_path.iterdir()) == []


def test_a_format_without_a_form_on_disk(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    cache = fill(model, IDS)
    monkeypatch.setattr(type(cache.session.format), "dump", rdkv.CacheFormat.dump)
    with pytest.raises(rdkv.ConfigError, match="caches of the format 'mixed-bit' cannot be saved: its plugin has no"):
        rdkv.save(cache, tmp_path / "doc.rdkv", model, IDS)
    assert list(tmp_path.iterdir()) == []
