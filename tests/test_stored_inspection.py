"""What is told of a saved cache without its model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import padding

import rdkv
from rdkv.runtime.inspection import layer_row
from rdkv.runtime.stored_cache import open_cache
from rdkv.runtime.stored_inspection import StoredInspection, inspect_stored

IDS = torch.randint(3, 259, (3, 60), generator=torch.Generator().manual_seed(0))
LENGTHS = [60, 23, 41]
TOKEN_BYTES = 2 * 2 * 16 * 2  # of a layer

TinyModel = Callable[..., Any]


def inspect(model: Any, path: Path, ids: Any = IDS, mask: Any = None, later: int = 0, **settings: Any) -> Any:
    """A cache, and what is told of its file."""
    config = rdkv.CompressionConfig(**({"budget": 0.3} | settings))
    cache = rdkv.CompressedCache(rdkv.attach(model).config, config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        if later:
            model(ids[:, :later], past_key_values=cache)
    rdkv.save(cache, path, model, torch.cat([ids, ids], 1), name="tiny", overwrite=True)
    return cache, inspect_stored(open_cache(path))


def test_one_prompt(tiny_model: TinyModel, tmp_path: Path) -> None:
    cache, found = inspect(tiny_model("llama"), tmp_path / "doc.rdkv", IDS[:1])
    assert isinstance(found, StoredInspection)
    assert found.layers == [layer_row(i, cache.plan(i), cache.layer_nbytes(i), 60 * TOKEN_BYTES) for i in range(2)]
    assert (found.cache_bytes, found.full_cache_bytes) == (cache.nbytes, cache.full_nbytes)
    assert found.retention == cache.retention
    assert (found.model, found.dtype, found.prompts, found.prompt_tokens) == ("tiny", "float32", 1, 60)
    assert (found.later_tokens, found.chat, found.budget, found.format) == (0, False, 0.3, "mixed-bit")
    assert found.file_bytes == (tmp_path / "doc.rdkv").stat().st_size


def test_padding_counts_nowhere(tiny_model: TinyModel, tmp_path: Path) -> None:
    cache, found = inspect(tiny_model("llama"), tmp_path / "doc.rdkv", IDS, padding(LENGTHS).long())
    assert (found.prompts, found.prompt_tokens) == (3, sum(LENGTHS))
    assert found.full_cache_bytes == cache.full_nbytes == 2 * sum(LENGTHS) * TOKEN_BYTES
    kept = [cache.plan(layer).kept.sum() / (2 * sum(LENGTHS)) for layer in range(2)]
    assert [row.kept for row in found.layers] == pytest.approx([float(share) for share in kept])
    for row in found.layers:
        assert sum(row.values.values()) == pytest.approx(1)


def test_later_tokens(tiny_model: TinyModel, tmp_path: Path) -> None:
    cache, found = inspect(tiny_model("llama"), tmp_path / "doc.rdkv", later=9)
    assert found.later_tokens == 9
    assert found.full_cache_bytes == cache.full_nbytes
    assert found.cache_bytes == cache.nbytes


@pytest.mark.parametrize("budget", [0.0001, 1.0])
def test_nothing_and_everything(tiny_model: TinyModel, tmp_path: Path, budget: float) -> None:
    cache, found = inspect(tiny_model("llama", torch.bfloat16), tmp_path / "doc.rdkv", budget=budget)
    assert found.cache_bytes == cache.nbytes
    assert {row.kept for row in found.layers} == {float(round(budget))}


def test_without_positions_there_is_no_table(tiny_model: TinyModel, tmp_path: Path) -> None:
    cache, found = inspect(tiny_model("llama"), tmp_path / "doc.rdkv", format_options={"positions": False})
    assert found.layers == []
    assert found.cache_bytes == cache.nbytes
