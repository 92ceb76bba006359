"""Bits of each layer's heads from the three ways to say a budget, and from what each layer costs."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdkv.runtime.budget import DECAY, HEAD_POWER, LEAST_WEIGHT, SHARES, head_weights, layer_bits, layer_shares
from rdkv.runtime.config import CompressionConfig
from rdkv.runtime.plan import Budget

FULL = 2 * 64 * 16 * 1000  # key and value of 1000 tokens at 16 bits
LOSSES = st.lists(st.floats(0, 1e3, allow_subnormal=False), min_size=1, max_size=40).map(tuple)


def dealt(shares: tuple[float, ...], tokens: int = 1000, heads: int = 3, **budget: float) -> tuple[int, ...]:
    return layer_bits(CompressionConfig(**budget), tokens, 64, heads, shares)  # type: ignore[arg-type]


def bits(tokens: int = 1000, heads: int = 3, layers: int = 5, **budget: float) -> int:
    """Where all layers have the same."""
    (each,) = set(dealt((1.0,) * layers, tokens, heads, **budget))
    return each


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


def test_layers_have_their_shares() -> None:
    assert dealt((0.5, 2.0, 0.5), budget=0.1) == (FULL // 20, FULL // 5, FULL // 20)
    assert dealt((0.5, 2.0, 0.5), budget_tokens=100) == (FULL // 20, FULL // 5, FULL // 20)
    assert dealt((0.5, 2.0, 0.5), budget_bytes=9 * FULL // 80) == (FULL // 20, FULL // 5, FULL // 20)


def test_a_layer_takes_no_more_than_its_full_cache() -> None:
    assert dealt((0.25, 2.5, 0.25), budget=0.5) == (FULL // 4, FULL, FULL // 4)
    assert dealt((0.25, 2.5, 0.25), budget=1.0) == (FULL, FULL, FULL)
    assert dealt((0.3, 0.9, 1.8), budget=0.9) == (7 * FULL // 10, FULL, FULL)


@given(losses=LOSSES, share=st.floats(1e-6, 1.0), tokens=st.integers(1, 10**6))
def test_layers_together_spend_what_was_given(losses: tuple[float, ...], share: float, tokens: int) -> None:
    each = bits(tokens, layers=1, budget=share)
    found = dealt(layer_shares(losses), tokens, budget=share)
    assert each * len(losses) - len(losses) <= sum(found) <= each * len(losses)
    assert max(found) <= 2 * 64 * 16 * tokens


@given(losses=LOSSES)
def test_shares_are_of_an_even_budget(losses: tuple[float, ...]) -> None:
    shares = layer_shares(losses)
    pairs = list(zip(losses, shares, strict=True))
    assert sum(shares) == pytest.approx(len(losses))
    assert all(a <= b * (1 + 1e-9) for (x, a), (y, b) in itertools.permutations(pairs, 2) if x <= y)


def test_shares_cost_least() -> None:
    losses = (1.0, 2.0, 4.0, 0.5)

    def cost(shares: tuple[float, ...]) -> float:
        return sum(loss * share**-DECAY for loss, share in zip(losses, shares, strict=True))

    shares = layer_shares(losses)
    for i, j in itertools.permutations(range(4), 2):
        moved = tuple(s + 0.01 * ((k == i) - (k == j)) for k, s in enumerate(shares))
        assert cost(moved) > cost(shares)
    assert layer_shares(tuple(10 * loss for loss in losses)) == pytest.approx(shares)


def test_shares_have_bounds() -> None:
    shares = layer_shares((1e6, *(1e-6,) * 20))
    assert max(shares) / min(shares) <= SHARES[1] / SHARES[0] * (1 + 1e-9)
    assert layer_shares((0.0, 0.0, 0.0)) == (1.0, 1.0, 1.0)


@given(losses=LOSSES)
def test_heads_weigh_by_their_losses(losses: tuple[float, ...]) -> None:
    weights = head_weights(losses)
    assert max(weights) == 1.0
    assert min(weights) >= LEAST_WEIGHT
    assert all(a <= b for (x, a), (y, b) in itertools.permutations(zip(losses, weights, strict=True), 2) if x <= y)
    assert head_weights(tuple(8 * loss for loss in losses)) == pytest.approx(weights)


def test_weights_of_heads_by_hand() -> None:
    assert head_weights((1.0, 4.0, 0.5)) == pytest.approx((0.25**HEAD_POWER, 1.0, 0.125**HEAD_POWER))
    assert head_weights((1e-9, 1.0)) == (LEAST_WEIGHT, 1.0)
    assert head_weights((0.0, 0.0)) == (1.0, 1.0)


def test_total_is_that_of_the_heads() -> None:
    assert Budget(100, 7).total == 700
