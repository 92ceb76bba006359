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
