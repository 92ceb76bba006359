"""Bits of a head from the three ways to say a budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdkv.runtime.budget import head_bits
from rdkv.runtime.config import CompressionConfig
from rdkv.runtime.plan import Budget

FULL = 2 * 64 * 16 * 1000  # key and value of 1000 tokens at 16 bits


def bits(tokens: int = 1000, heads: int = 3, layers: int = 5, **budget: float) -> int:
    return head_bits(CompressionConfig(**budget), tokens, 64, heads, layers)  # type: ignore[arg-type]


def test_a_share_of_the_full_cache() -> None:
    assert bits(budget=1.0) == FULL
    assert bits(budget=0.05) == FULL // 20
    assert bits(budget=1e-9) == 0
    assert bits(budget=0.5, heads=1, layers=1) == FULL // 2


def test_tokens_of_each_head() -> None:
    assert bits(budget_tokens=10) == FULL // 100
    assert bits(budget_tokens=1000) == bits(budget_tokens=5000) == FULL  # never more than the prompt takes
    assert bits(budget_tokens=10, tokens=7) == 7 * 2 * 64 * 16


def test_bytes_of_all_layers_and_heads_of_a_sequence() -> None:
    assert bits(budget_bytes=15 * 8000) == 8 * 8000
    assert bits(budget_bytes=15 * 8000 + 1) == 8 * 8000  # rounded down
    assert bits(budget_bytes=10**12) == FULL
    assert bits(budget_bytes=1) == 0


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("layers", [1, 30])
@given(share=st.floats(1e-6, 1.0), tokens=st.integers(1, 10**6), size=st.integers(1, 10**12))
def test_heads_together_stay_within_what_was_given(
    heads: int, layers: int, share: float, tokens: int, size: int
) -> None:
    assert bits(tokens, heads, layers, budget_bytes=size) * heads * layers <= 8 * size
    full = 2 * 64 * 16 * tokens
    assert bits(tokens, heads, layers, budget=share) <= share * full
    assert bits(tokens, heads, layers, budget=share) > share * full - 1


def test_total_is_that_of_the_heads() -> None:
    assert Budget(100, 7).total == 700
