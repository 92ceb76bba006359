"""Baseline scorers against their formulas in plain loops, and over odd shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rdkv.plugins.baselines.channels import think_channels
from rdkv.runtime.checks import check_scores
from rdkv.runtime.observation import Observation
from rdkv.runtime.plan import Scores
from rdkv.runtime.registry import load_registry

NAMES = ["snapkv", "key-norm", "streaming", "expected-attention", "think", "random"]
B, H, G, D = 2, 2, 3, 8


def observe(
    tokens: int = 40,
    batch: int = B,
    groups: int = G,
    dtype: torch.dtype = torch.float32,
    gain: float = 1.0,
    layer: int = 5,
) -> Observation:
    """A random layer; ``gain`` multiplies everything."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(heads: int) -> Tensor:
        return (gain * torch.randn(batch, heads, tokens, D, generator=generator)).to(dtype)

    return Observation(draw(H), draw(H), draw(H * groups), D**-0.5, layer)


def row(observation: Observation, index: int) -> Observation:
    part = slice(index, index + 1)
    return Observation(
        observation.keys[part],
        observation.values[part],
        observation.queries[part],
        observation.scale,
        observation.layer,
    )


def score(name: str, observation: Observation, **options: Any) -> Scores:
    scores = load_registry().scorer(name, options).score(observation)
    check_scores(scores, observation, name)
    return scores


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 31, 32, 33, 40])
@pytest.mark.parametrize("groups", [1, 3])
def test_keeps_the_contract(name: str, tokens: int, groups: int) -> None:
    scores = score(name, observe(tokens, groups=groups))
    assert bool((scores.token.sum(-1) > 0).all())
    assert bool((scores.channel > 0).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gain", [1e-3, 100.0])
def test_half_precision_and_extreme_magnitudes(name: str, dtype: torch.dtype, gain: float) -> None:
    low = observe(dtype=dtype, gain=gain)
    high = Observation(low.keys.double().float(), low.values.float(), low.queries.float(), low.scale, low.layer)
    for a, b in zip(_tensors(score(name, low)), _tensors(score(name, high)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_independent(name: str) -> None:
    observation = observe(batch=3)
    together = score(name, observation)
    for i in range(3):
        alone = score(name, row(observation, i))
        torch.testing.assert_close(alone.token[0], together.token[i])
        torch.testing.assert_close(alone.channel[0], together.channel[i])


@pytest.mark.parametrize("name", NAMES)
def test_leaves_the_observation_alone(name: str) -> None:
    observation = observe()
    before = [t.clone() for t in (observation.keys, observation.values, observation.queries)]
    score(name, observation)
    assert all(map(torch.equal, before, (observation.keys, observation.values, observation.queries)))


def naive_attention(observation: Observation, window: int) -> list[list[list[Tensor]]]:
    """``[b][h][g]`` of ``[W, T]`` float64, one query at a time."""
    tokens = observation.tokens
    rows = range(max(tokens - window, 0), tokens)
    result = []
    for b in range(observation.keys.shape[0]):
        result.append([])
        for h in range(H):
            keys = observation.keys[b, h].double()
            heads = []
            for g in range(observation.groups):
                queries = observation.queries[b, h * observation.groups + g].double()
                weights = torch.zeros(len(rows), tokens, dtype=torch.float64)
                for i, t in enumerate(rows):
                    weights[i, : t + 1] = (observation.scale * keys[: t + 1] @ queries[t]).softmax(0)
                heads.append(weights)
            result[-1].append(heads)
    return result


@pytest.mark.parametrize(("pooling", "size"), [("avg", 1), ("avg", 5), ("max", 7)])
@pytest.mark.parametrize(("tokens", "window"), [(40, 8), (9, 8), (8, 8), (5, 8)])
def test_snapkv_formula(pooling: str, size: int, tokens: int, window: int) -> None:
    observation = observe(tokens)
    token = score("snapkv", observation, window=window, pooling=pooling, kernel_size=size).token
    attention = naive_attention(observation, window)
    cut = max(tokens - window, 0)
    for b in range(B):
        for h in range(H):
            votes = sum(attention[b][h]) / G
            seen = (votes > 0).sum(0)
            votes = votes.sum(0) / seen
            expected = votes.clone()
            for t in range(cut):
                near = votes[max(t - size // 2, 0) : min(t + size // 2 + 1, cut)]
                expected[t] = near.max() if pooling == "max" else near.sum() / size
            if cut:
                expected[cut:] += expected[:cut].max()
            torch.testing.assert_close(token[b, h].double(), expected, rtol=1e-5, atol=1e-7)


def test_snapkv_window_ranks_first() -> None:
    token = score("snapkv", observe(40), window=8).token
    assert bool((token[..., 32:].amin(-1) > token[..., :32].amax(-1)).all())


def test_key_norm_prefers_small_keys_whatever_their_scale() -> None:
    observation = observe()
    token = score("key-norm", observation).token
    norms = observation.keys.norm(dim=-1)
    assert torch.equal(token.argsort(-1, descending=True), norms.argsort(-1))
    torch.testing.assert_close(token, score("key-norm", observe(gain=100.0)).token)


def test_key_norm_of_zero_keys() -> None:
    observation = observe()
    observation.keys[:, 0] = 0.0
    observation.keys[:, 1, 3] = 0.0
    token = score("key-norm", observation).token
    assert bool((token[:, 0] == 1).all())
    assert bool((token[:, 1].argmax(-1) == 3).all())


@pytest.mark.parametrize("sinks", [0, 2, 4, 50])
def test_streaming_order(sinks: int) -> None:
    token = score("streaming", observe(10), sinks=sinks).token
    first = list(range(min(sinks, 10)))
    order = first + list(range(9, len(first) - 1, -1))
    assert bool((token.argsort(-1, descending=True) == torch.tensor(order)).all())


def test_streaming_tells_the_positions_of_a_long_prompt_apart() -> None:
    tokens = 1 << 20
    flat = torch.ones(1, 1, tokens, 1)
    token = score("streaming", Observation(flat, flat, flat, 1.0, 0)).token[0, 0]
    assert bool((token[:4].diff() < 0).all())
    assert bool((token[4:].diff() > 0).all())


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("value_norm", [True, False])
@pytest.mark.parametrize(("tokens", "sinks"), [(40, 4), (40, 0), (3, 4), (1, 4)])
def test_expected_attention_formula(covariance: bool, value_norm: bool, tokens: int, sinks: int) -> None:
    observation = observe(tokens)
    options = {"covariance": covariance, "value_norm": value_norm, "sinks": sinks, "window": 16, "epsilon": 0.01}
    token = score("expected-attention", observation, **options).token.double()
    start = max(tokens - 16, min(sinks, tokens - 1))
    for b in range(B):
        for h in range(H):
            keys, values = observation.keys[b, h].double(), observation.values[b, h].double()
            expected = torch.zeros(tokens, dtype=torch.float64)
            for g in range(G):
                queries = observation.queries[b, h * G + g, start:].double()
                mean = queries.mean(0)
                spread = (queries - mean).T @ (queries - mean) / len(queries)
                exponent = [
                    float(observation.scale * mean @ k + covariance * 0.5 * observation.scale**2 * k @ spread @ k)
                    for k in keys
                ]
                weights = [math.exp(x) for x in exponent]
                expected += torch.tensor(weights, dtype=torch.float64) / sum(weights) / G
            if value_norm:
                expected = (expected + 0.01) * values.norm(dim=-1)
            expected[:sinks] = expected.max()
            torch.testing.assert_close(token[b, h], expected, rtol=1e-4, atol=1e-7)


def test_expected_attention_is_the_mean_over_normal_queries() -> None:
    observation = observe(64, batch=1, groups=1, gain=0.7)
    options = {"value_norm": False, "sinks": 0}
    token = score("expected-attention", observation, **options).token[0, 0].double()
    queries, keys = observation.queries[0, 0].double(), observation.keys[0, 0].double()
    normal = torch.distributions.MultivariateNormal(queries.mean(0), queries.T.cov(correction=0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = normal.sample((100_000,))
    estimate = (observation.scale * drawn @ keys.T).exp().mean(0)
    torch.testing.assert_close(token, estimate / estimate.sum(), rtol=0.05, atol=1e-4)


def test_expected_attention_of_huge_logits_does_not_overflow() -> None:
    observation = observe(gain=1e4)
    token = score("expected-attention", observation, value_norm=False).token
    assert bool((token.amax(-1) > 0).all())


def test_random_depends_on_seed_layer_and_length_alone() -> None:
    state = torch.random.get_rng_state()
    one = score("random", observe(batch=1)).token
    assert torch.equal(state, torch.random.get_rng_state())
    many = score("random", observe(batch=3, gain=2.0)).token
    assert torch.equal(many, one.expand(3, -1, -1))
    assert not torch.equal(one[:, 0], one[:, 1])
    assert not torch.equal(one, score("random", observe(batch=1), seed=1).token)
    assert not torch.equal(one, score("random", observe(batch=1, layer=6)).token)


def test_think_channels_formula() -> None:
    observation = observe()
    expected = torch.zeros(B, H, D)
    for b in range(B):
        for h in range(H):
            for c in range(D):
                queries = observation.queries[b, h * G : h * G + G, -8:, c]
                expected[b, h, c] = queries.square().mean() * observation.keys[b, h, :, c].square().mean()
    torch.testing.assert_close(think_channels(observation, 8), expected)
    torch.testing.assert_close(score("think", observation, window=8).channel, expected)
    torch.testing.assert_close(score("snapkv", observation, window=8).channel, expected)


def test_think_ranks_no_token_before_another() -> None:
    token = score("think", observe()).token
    assert bool((token == token[0, 0, 0]).all())


def _tensors(scores: Scores) -> tuple[Tensor, Tensor]:
    return scores.token, scores.channel
