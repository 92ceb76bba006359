"""A masked cache attends to what is not evicted, and to nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from transformers import DynamicCache

import rdkv
from bench.quality.peers.masked import masked_cache
from rdkv.runtime.errors import UnsupportedModelError

BATCH, TOKENS, HEADS = 2, 40, 2
IDS = torch.randint(3, 259, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
MORE = torch.randint(3, 259, (BATCH, 5), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(TOKENS, TOKENS + 5)[None]


@torch.no_grad()
def full_cache(model: Any) -> DynamicCache:
    cache = DynamicCache()
    model(IDS, past_key_values=cache)
    return cache


@torch.no_grad()
def continued(model: Any, cache: Any, at_once: int = 5) -> torch.Tensor:
    parts = zip(MORE.split(at_once, 1), POSITIONS.split(at_once, 1), strict=True)
    return torch.cat([model(ids, past_key_values=cache, position_ids=at).logits for ids, at in parts], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_evicted_is_the_full_cache(family: str, tiny_model: Callable[..., Any]) -> None:
    model = rdkv.attach(tiny_model(family))
    nothing = [torch.zeros(BATCH, HEADS, TOKENS, dtype=torch.bool)] * 2
    masked = continued(model, masked_cache(full_cache(model), nothing))
    torch.testing.assert_close(masked, continued(model, full_cache(model)))


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_a_token_that_every_head_lost_is_as_if_it_were_not_there(at_once: int, tiny_model: Callable[..., Any]) -> None:
    model = rdkv.attach(tiny_model())
    kept = torch.tensor([0, 3, 4, 17, 30, 39])
    evicted = torch.ones(BATCH, HEADS, TOKENS, dtype=torch.bool)
    evicted[:, :, kept] = False
    masked = continued(model, masked_cache(full_cache(model), [evicted, evicted]), at_once)
    short = full_cache(model)
    for layer in short.layers:
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    torch.testing.assert_close(masked, continued(model, short))


def test_each_head_of_each_sequence_has_its_own_mask(tiny_model: Callable[..., Any]) -> None:
    """Keys and values that a head lost can be anything: nobody reads them."""
    model = rdkv.attach(tiny_model())
    evicted = [torch.rand(BATCH, HEADS, TOKENS, generator=torch.Generator().manual_seed(i)) < 0.7 for i in range(2)]
    spoilt = full_cache(model)
    for layer, mask in zip(spoilt.layers, evicted, strict=True):
        layer.keys = torch.where(mask[..., None], 1e4, layer.keys)
        layer.values = torch.where(mask[..., None], 1e4, layer.values)
    expected = continued(model, masked_cache(full_cache(model), evicted))
    torch.testing.assert_close(continued(model, masked_cache(spoilt, evicted)), expected)
    assert not torch.allclose(expected, continued(model, full_cache(model)), atol=1e-2)


def test_padding_is_refused(tiny_model: Callable[..., Any]) -> None:
    model = rdkv.attach(tiny_model())
    cache = masked_cache(full_cache(model), [torch.zeros(BATCH, HEADS, TOKENS, dtype=torch.bool)] * 2)
    mask = torch.ones(BATCH, TOKENS + 5, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(UnsupportedModelError, match="without padding"):
        model(MORE, past_key_values=cache, attention_mask=mask)
