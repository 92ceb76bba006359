"""Bytes of peers' caches: float32 counts as 16 bits, masks and zeros as what is left of them."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from bench.quality.peers.held import allocated, half_bytes, needed
from bench.quality.peers.masked import masked_cache
from bench.quality.peers.shape import Shape

SHAPE = Shape(layers=2, batch=1, heads=3, tokens=10, dim=16)


def cache(dtype: torch.dtype = torch.float32) -> DynamicCache:
    made = DynamicCache()
    for layer in range(SHAPE.layers):
        keys, values = torch.randn(2, SHAPE.batch, SHAPE.heads, SHAPE.tokens, SHAPE.dim, dtype=dtype)
        made.update(keys, values, layer)
    return made


def test_float32_stands_for_16_bits() -> None:
    numbers = torch.zeros(3, 5)
    assert half_bytes(numbers) == half_bytes(numbers.half()) == half_bytes(numbers.bfloat16()) == 30
    assert half_bytes(numbers.to(torch.uint8)) == 15
    assert half_bytes(numbers.to(torch.int64)) == 120
    assert half_bytes(numbers[:1]) == 30  # a part keeps the whole storage


def test_a_full_cache() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        made = cache(dtype)
        assert needed(made, SHAPE) == allocated(made) == SHAPE.pairs * SHAPE.pair_bytes == 2 * 2 * 2 * 3 * 10 * 16


def test_masked_tokens_are_not_needed_but_there() -> None:
    evicted = [torch.zeros(1, 3, 10, dtype=torch.bool) for _ in range(2)]
    assert needed(masked_cache(cache(), evicted), SHAPE) == SHAPE.pairs * SHAPE.pair_bytes
    evicted[1][0, 2, 3:8] = True
    made = masked_cache(cache(), evicted)
    assert needed(made, SHAPE) == (60 - 5) * 64 + 2 * 4 * 4  # where each of three heads begins, and the end
    assert allocated(made) == 60 * 64 + 5 * 24


def test_channels_of_zeros_are_not_needed_but_there() -> None:
    made = cache()
    assert made.layers[0].keys is not None
    made.layers[0].keys[:, 1, :, 4:7] = 0
    made.layers[0].keys[:, 2, 0, :] = 0  # a token of zeros is no channel
    assert needed(made, SHAPE) == 60 * 64 - 3 * 10 * 2 + 2 * 3 * 2
    assert allocated(made) == 60 * 64
