"""The attention-distortion scorer against its formulas in float64, one query and token at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rdkv.kernels import naive_window
from rdkv.plugins.rdkv.scorer import AttentionDistortion, AttentionDistortionOptions, smooth
from rdkv.runtime.checks import check_scores
from rdkv.runtime.observation import Observation
from rdkv.runtime.plan import Scores

B, H, G, D = 2, 2, 3, 8
TOKEN_WEIGHTS = ["first-moment", "root-second-moment", "max", "first-moment-distance", "root-second-moment-distance"]
KERNELS = ["mean", "max", "gaussian", "pyramid"]
CHANNEL_WEIGHTS = ["variance", "think", "attention"]
SHAPES = [(40, 8), (9, 8), (8, 8), (5, 8), (1, 8), (12, 1)]  # tokens, window


def observe(tokens: int = 40, batch: int = B, groups: int = G, dtype: torch.dtype = torch.float32) -> Observation:
    """A random layer with peaked attention and keys off centre."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(heads: int) -> Tensor:
        return torch.randn(batch, heads, tokens, D, generator=generator)

    keys = 2 * draw(H) + 3 * torch.arange(D)
    return Observation(keys.to(dtype), draw(H).to(dtype), (2 * draw(H * groups)).to(dtype), D**-0.5, 5)


def score(observation: Observation, **options: Any) -> Scores:
    """Scores without smoothing, leverage or sinks, unless the options say otherwise."""
    plain = {"smoothing": 1, "leverage": 0.0, "sinks": 0} | options
    scores = AttentionDistortion(AttentionDistortionOptions(**plain)).score(observation)
    check_scores(scores, observation, "attention-distortion")
    return scores


def window_rows(observation: Observation, window: int, b: int, h: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each query in the window of a KV head: the query, its attention over what it sees, its output."""
    tokens = observation.tokens
    keys, values = observation.keys[b, h].double(), observation.values[b, h].double()
    rows = []
    for g in range(observation.groups):
        for t in range(max(tokens - window, 0), tokens):
            query = observation.queries[b, h * observation.groups + g, t].double()
            attention = (observation.scale * keys[: t + 1] @ query).softmax(0)
            rows.append((query, attention, attention @ values[: t + 1]))
    return rows


def token_reference(observation: Observation, window: int, weight: str) -> Tensor:
    result = torch.zeros(observation.keys.shape[:3], dtype=torch.float64)
    for b in range(result.shape[0]):
        for h in range(result.shape[1]):
            rows = window_rows(observation, window, b, h)
            for t in range(observation.tokens):
                seen = [(a[t], (o - observation.values[b, h, t].double()).norm()) for _, a, o in rows if len(a) > t]
                terms = {
                    "first-moment": [a for a, _ in seen],
                    "root-second-moment": [a**2 for a, _ in seen],
                    "max": [a for a, _ in seen],
                    "first-moment-distance": [a * d for a, d in seen],
                    "root-second-moment-distance": [(a * d) ** 2 for a, d in seen],
                }[weight]
                if weight == "max":
                    result[b, h, t] = max(terms)
                else:
                    mean = sum(terms) / len(terms)
                    result[b, h, t] = mean if weight.startswith("first") else mean**0.5
    return result


def channel_reference(observation: Observation, window: int, weight: str, sinks: int = 0) -> Tensor:
    batch, heads, tokens, dim = observation.keys.shape
    sinks = sinks if sinks < tokens else 0
    result = torch.zeros(batch, heads, dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            rows = window_rows(observation, window, b, h)
            values = observation.values[b, h].double()
            moved = [float(sum(a[t] ** 2 * (values[t] - o).square().sum() for t in range(len(a)))) for _, a, o in rows]
            for c in range(dim):
                key = observation.keys[b, h, sinks:, c].double().tolist()
                mean = sum(key) / len(key)
                variance = sum((k - mean) ** 2 for k in key) / len(key)
                square = sum(k**2 for k in key) / len(key)
                queries = [float(query[c]) ** 2 for query, _, _ in rows]
                if weight == "attention":
                    queries = [q * m for q, m in zip(queries, moved, strict=True)]
                result[b, h, c] = sum(queries) / len(queries) * (square if weight == "think" else variance)
    return result


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("weight", TOKEN_WEIGHTS)
@pytest.mark.parametrize(("tokens", "window"), SHAPES)
def test_token_weight(weight: str, tokens: int, window: int) -> None:
    observation = observe(tokens)
    token = score(observation, window=window, token_weight=weight).token
    expected = token_reference(observation, window, weight)
    if tokens == 1:  # the output is the value: nothing to tell them apart but rounding
        torch.testing.assert_close(token.double(), expected, rtol=1e-6, atol=2e-3)
    else:
        close(token, expected)


@pytest.mark.parametrize("share", [0.1, 2.0])
def test_leverage_of_values(share: float) -> None:
    """At least mean weights of the head in each sequence, times the excess leverage by a regression in float64."""
    observation = observe(40)
    plain = score(observation, sinks=3, smoothing=5).token
    values = observation.values.double()
    centred = values - values.mean(2, keepdim=True)
    covariance = centred.transpose(2, 3) @ centred / 40
    covariance += 1e-4 * covariance.diagonal(dim1=2, dim2=3).mean(-1)[..., None, None] * torch.eye(D)
    expected = torch.einsum("bhtc,bhcd,bhtd->bht", centred, covariance.inverse(), centred) / D
    mean = plain.double().mean(2, keepdim=True)
    token = score(observation, sinks=3, smoothing=5, leverage=share).token
    assert bool((token > plain).any())
    assert bool((token == plain).any())
    close(token, torch.maximum(plain.double(), share * mean * (expected - 1)))


@pytest.mark.parametrize("weight", CHANNEL_WEIGHTS)
@pytest.mark.parametrize(("tokens", "window"), [shape for shape in SHAPES if shape[0] > 1])
@pytest.mark.parametrize("sinks", [0, 4, 50])
def test_channel_weight(weight: str, tokens: int, window: int, sinks: int) -> None:
    observation = observe(tokens)
    channel = score(observation, window=window, channel_weight=weight, sinks=sinks).channel
    close(channel, channel_reference(observation, window, weight, sinks))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_query_heads_of_a_kv_head_are_its_own(groups: int) -> None:
    observation = observe(20, groups=groups)
    scores = score(observation, window=4, token_weight="first-moment", channel_weight="think")
    close(scores.token, token_reference(observation, 4, "first-moment"))
    close(scores.channel, channel_reference(observation, 4, "think"))
    changed = observation.queries.clone()
    changed[:, groups:] *= -1  # those of the second KV head
    other = Observation(observation.keys, observation.values, changed, observation.scale, observation.layer)
    token = score(other, window=4, token_weight="first-moment").token
    assert torch.equal(token[:, 0], scores.token[:, 0])
    assert not torch.allclose(token[:, 1], scores.token[:, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", TOKEN_WEIGHTS)
def test_half_precision_is_scored_in_float32(dtype: torch.dtype, weight: str) -> None:
    low = observe(dtype=dtype)
    high = Observation(low.keys.float(), low.values.float(), low.queries.float(), low.scale, low.layer)
    options = {"window": 8, "token_weight": weight, "channel_weight": "attention"}
    for name in ("token", "channel"):
        torch.testing.assert_close(getattr(score(low, **options), name), getattr(score(high, **options), name))


def reflected(index: int, tokens: int) -> int:
    """Position of an index beyond the ends, mirrored at the first or last token."""
    index = abs(index)
    return index if index < tokens else 2 * (tokens - 1) - index


def smooth_reference(token: Tensor, width: int, kernel: str, ahead: float = 0.5) -> Tensor:
    if kernel == "pyramid":
        parts = [smooth_reference(token, max(1, width // part), "mean", ahead) for part in (1, 4, 16)]
        return sum(parts, torch.zeros(())) / 3
    tokens = token.shape[-1]
    half = min(width // 2, tokens - 1)
    after = half if kernel == "gaussian" else min(round(2 * half * ahead), tokens - 1)
    offsets = range(-after, min(2 * half - after, tokens - 1) + 1)  # a token's weight comes from those before it
    deviation = (2 * half + 1) / 4  # the kernel ends at two standard deviations
    bell = [math.exp(-0.5 * (i / deviation) ** 2) if kernel == "gaussian" else 1.0 for i in offsets]
    result = torch.zeros_like(token, dtype=torch.float64)
    for t in range(tokens):
        near = [token[..., reflected(t + i, tokens)].double() for i in offsets]
        if kernel == "max":
            result[..., t] = torch.stack(near).amax(0)
        else:
            result[..., t] = sum(w * x for w, x in zip(bell, near, strict=True)) / sum(bell)
    return result


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ahead", [0.5, 0.75, 0.0, 1.0])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 23, 24, 1000])
@pytest.mark.parametrize("tokens", [1, 2, 3, 12])
def test_smoothing(kernel: str, ahead: float, width: int, tokens: int) -> None:
    token = torch.rand(B, H, tokens, generator=torch.Generator().manual_seed(0))
    smoothed = smooth(token, width, kernel, ahead)
    assert smoothed.shape == token.shape
    torch.testing.assert_close(smoothed.double(), smooth_reference(token, width, kernel, ahead), rtol=1e-5, atol=1e-6)
    even = width if width % 2 == 0 else width - 1
    assert even == 0 or torch.equal(smoothed, smooth(token, even, kernel, ahead))
    if kernel != "max":
        torch.testing.assert_close(smooth(torch.ones(1, 1, tokens), width, kernel, ahead), torch.ones(1, 1, tokens))


def test_ahead_spreads_a_weight_to_later_tokens() -> None:
    token = torch.zeros(1, 1, 41)
    token[..., 20] = 1.0
    assert smooth(token, 9, "mean", 0.75)[0, 0].nonzero().flatten().tolist() == list(range(18, 27))
    assert smooth(token, 9, "mean", 1.0)[0, 0].nonzero().flatten().tolist() == list(range(20, 29))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sinks", [0, 3])
def test_scores_are_smoothed_after_sinks_are_taken_out(kernel: str, sinks: int) -> None:
    observation = observe(20)
    raw = score(observation, window=8).token.clone()
    raw[..., :sinks] = 0.0
    token = score(observation, window=8, kernel=kernel, smoothing=5, sinks=sinks).token
    torch.testing.assert_close(token.double(), smooth_reference(raw, 5, kernel, 0.75), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("sinks", "tokens"), [(0, 10), (1, 10), (4, 10), (10, 10), (4, 3), (4, 1)])
def test_sinks_are_pinned(sinks: int, tokens: int) -> None:
    scores = score(observe(tokens), sinks=sinks)
    if sinks == 0:
        assert scores.pinned is None
        return
    assert scores.pinned is not None
    assert torch.equal(scores.pinned, (torch.arange(tokens) < sinks).expand(B, H, tokens))
    assert bool((scores.token[..., :sinks] == 0).all())


def test_a_sink_does_not_lift_its_neighbours() -> None:
    observation = observe(20, groups=1)
    loud = observation.keys.clone()
    loud[:, :, 0] = 40 * observation.queries[:, :, -1]  # the last query attends to it alone
    other = Observation(loud, observation.values, observation.queries, observation.scale, observation.layer)
    assert float(score(other, window=1, kernel="mean", smoothing=5).token[..., 1].min()) > 0.1
    assert float(score(other, window=1, kernel="mean", smoothing=5, sinks=1).token[..., 1].max()) < 1e-6


def test_one_token() -> None:
    observation = observe(1)
    for weight in TOKEN_WEIGHTS[:3]:
        assert bool((score(observation, token_weight=weight, smoothing=65).token == 1).all())
    assert bool((score(observation, channel_weight="variance").channel == 0).all())
    close(score(observation, channel_weight="think").channel, channel_reference(observation, 8, "think"))


def test_a_window_longer_than_the_prompt_is_the_prompt() -> None:
    observation = observe(6)
    for name in ("token", "channel"):
        assert torch.equal(getattr(score(observation, window=1000), name), getattr(score(observation, window=6), name))


@pytest.mark.parametrize("weight", TOKEN_WEIGHTS)
@pytest.mark.parametrize("elements", [1, B * G * 8 * 40])
def test_attention_in_chunks_is_the_same(weight: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    observation = observe(40)
    options = {"window": 8, "token_weight": weight, "channel_weight": "attention"}
    whole = score(observation, **options)
    assert len(list(observation.attention_chunks(8))) == 1
    monkeypatch.setattr(naive_window, "CHUNK_ELEMENTS", elements)
    assert len(list(observation.attention_chunks(8))) == H
    chunked = score(observation, **options)
    torch.testing.assert_close(chunked.token, whole.token)
    torch.testing.assert_close(chunked.channel, whole.channel)


@pytest.mark.parametrize("options", [{}, {"token_weight": "first-moment-distance", "channel_weight": "attention"}])
def test_rows_are_independent(options: dict[str, Any]) -> None:
    observation = observe(batch=3)
    together = score(observation, smoothing=5, sinks=4, **options)
    assert together.pinned is not None
    for i in range(3):
        keys, values, queries = (t[i : i + 1] for t in (observation.keys, observation.values, observation.queries))
        row = Observation(keys, values, queries, observation.scale, observation.layer)
        alone = score(row, smoothing=5, sinks=4, **options)
        torch.testing.assert_close(alone.token[0], together.token[i])
        torch.testing.assert_close(alone.channel[0], together.channel[i])


def test_leaves_the_observation_alone() -> None:
    observation = observe()
    before = [t.clone() for t in (observation.keys, observation.values, observation.queries)]
    score(observation, smoothing=5, sinks=4, token_weight="first-moment-distance", channel_weight="attention")
    assert all(map(torch.equal, before, (observation.keys, observation.values, observation.queries)))
