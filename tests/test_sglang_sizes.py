"""What prompts take of the arena, known before they are read."""

from __future__ import annotations

import pytest
import torch

from rdkv.kernels.arena import ArenaShape
from rdkv.plugins.sglang.sizes import rank_config, region_bytes, storage_dtype
from rdkv.runtime.config import CompressionConfig

SHAPE = ArenaShape(layers=4, heads=8, dim=128, dtype=torch.bfloat16, places=5, nbytes=0)


@pytest.mark.parametrize("tokens", [256, 10_000, 131_072])
def test_a_region_is_the_budget_and_little_more(tokens: int) -> None:
    full = tokens * 8 * 4 * 128
    size = region_bytes(SHAPE, CompressionConfig(budget=0.05), tokens)
    assert size % SHAPE.unit == 0
    assert 0.05 * full - 1 <= size <= 0.05 * full + SHAPE.unit + 4 * 64


def test_budgets_in_tokens_and_bytes() -> None:
    tokens = region_bytes(SHAPE, CompressionConfig(budget_tokens=100), 10_000)
    assert tokens == SHAPE.region_bytes(100 * 8 * 4 * 128)
    total = CompressionConfig(budget_bytes=4_000_000)
    assert region_bytes(SHAPE, total, 10_000) == SHAPE.region_bytes(1_000_000)
    assert rank_config(total, heads=2, all_heads=8).budget_bytes == 1_000_000
    assert rank_config(total, heads=8, all_heads=8) is total


def test_storage_types() -> None:
    assert storage_dtype(torch.bfloat16, CompressionConfig(budget=0.1)) == torch.bfloat16
    assert storage_dtype(torch.float32, CompressionConfig(budget=0.1)) == torch.float16
    assert storage_dtype(torch.float32, CompressionConfig(budget=1.0)) == torch.float32
