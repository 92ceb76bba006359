"""How much a press may keep of a budget, whatever kvpress makes of the ratio; kvpress itself is not needed."""

from __future__ import annotations

import pytest

import rdkv
from bench.quality.peers.presses import Channels, Evicting, Masking
from bench.quality.peers.shape import Shape

SHAPES = [Shape(2, 1, 2, 160, 16), Shape(30, 3, 3, 6500, 64), Shape(32, 1, 8, 131_072, 128)]


def kept_tokens(ratio: float, tokens: int) -> int:
    """As kvpress finds it."""
    return max(1, int(tokens * (1 - ratio)))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ratio_keeps_as_many_tokens_as_fit(shape: Shape) -> None:
    token = shape.all_heads * shape.pair_bytes
    step = max(1, shape.tokens // 5000)
    for tokens in [*range(1, shape.tokens, step), shape.tokens]:
        for spare in (0, token - 1):
            ratio = Evicting(float).fit(shape, tokens * token + spare, shape.pair_bytes)
            assert kept_tokens(ratio, shape.tokens) == tokens
            assert 0 <= ratio < 1
    assert Evicting(float).fit(shape, shape.tokens * token, shape.pair_bytes) == 0
    with pytest.raises(rdkv.BudgetError):
        Evicting(float).fit(shape, token - 1, shape.pair_bytes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("budget", [0.001, 0.0248, 0.05, 0.31, 0.999, 1.0])
def test_pairs_of_the_whole_model_are_pruned_to_one(shape: Shape, budget: float) -> None:
    """KVzip finds what it prunes as ``int(pairs * ratio)``, for one sequence."""
    nbytes = int(budget * shape.pairs * shape.pair_bytes)
    pairs = shape.pairs // shape.batch
    try:
        ratio = Masking(float, across_layers=True).fit(shape, nbytes, shape.pair_bytes)
    except rdkv.BudgetError:
        assert nbytes - shape.ragged_bytes < shape.batch * shape.pair_bytes
        return
    kept = shape.batch * (pairs - int(pairs * ratio)) * shape.pair_bytes
    assert kept + (shape.ragged_bytes if ratio else 0) <= nbytes
    assert nbytes - kept - shape.ragged_bytes < shape.batch * shape.pair_bytes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.7])
def test_half_of_the_key_channels_leaves_room_for_a_third_more_tokens(shape: Shape, budget: float) -> None:
    nbytes = int(budget * shape.pairs * shape.pair_bytes)
    ratio, share = Channels(float, list, float).fit(shape, nbytes, shape.pair_bytes)
    assert int(shape.dim * share) == shape.dim // 2
    kept = kept_tokens(ratio, shape.tokens) * shape.all_heads
    left = nbytes - kept * shape.pair_bytes * 3 // 4 - shape.channel_map_bytes
    assert 0 <= left < shape.all_heads * shape.pair_bytes


@pytest.mark.parametrize("shape", SHAPES)
def test_channels_alone(shape: Shape) -> None:
    full = shape.pairs * shape.pair_bytes
    for budget in (0.6, 0.75, 0.9, 1.0):
        pruned = int(shape.dim * Channels(float, list).fit(shape, int(budget * full), shape.pair_bytes))
        nbytes = shape.pairs * 2 * (2 * shape.dim - pruned) + (shape.channel_map_bytes if pruned else 0)
        assert nbytes <= budget * full < nbytes + shape.pairs * 2 + shape.channel_map_bytes
    with pytest.raises(rdkv.BudgetError, match="half"):
        Channels(float, list).fit(shape, full // 2, shape.pair_bytes)
