"""What a scorer can ask of a layer: window queries, attention, its moments, statistics of keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rdkv.kernels import naive_window
from rdkv.runtime.observation import Observation

B, H, G, D = 2, 3, 2, 16
ON_GPU = torch.cuda.is_available()


def observe(tokens: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Observation:
    generator = torch.Generator().manual_seed(tokens)

    def draw(heads: int) -> Tensor:
        return torch.randn(B, heads, tokens, D, generator=generator).to(device, dtype)

    return Observation(draw(H) + 1, draw(H), 2 * draw(H * G), D**-0.5, 3)


def test_shape_of_a_layer() -> None:
    observation = observe(20)
    assert (observation.tokens, observation.heads, observation.groups) == (20, H, G)


def test_query_heads_follow_their_kv_head() -> None:
    observation = observe(20)
    queries = observation.window_queries(5)
    assert queries.shape == (B, H, G, 5, D)
    for h in range(H):
        for g in range(G):
            assert torch.equal(queries[:, h, g], observation.queries[:, h * G + g, 15:])


@pytest.mark.parametrize(("tokens", "window"), [(20, 5), (5, 5), (5, 50), (1, 1), (1, 8), (20, 1)])
def test_attention_is_causal_and_sums_to_one(tokens: int, window: int) -> None:
    observation = observe(tokens)
    width = min(window, tokens)
    attention = observation.attention(window)
    assert attention.shape == (B, H, G, width, tokens)
    torch.testing.assert_close(attention.sum(-1), torch.ones(B, H, G, width))
    for w in range(width):
        seen = tokens - width + w + 1
        assert bool((attention[..., w, :seen] > 0).all())
        assert not bool(attention[..., w, seen:].any())
    assert torch.equal(observation.visible(window), (attention[0, 0, 0] > 0).sum(0).float())


@pytest.mark.parametrize("window", [1, 5, 50])
def test_moments_are_those_of_the_attention(window: int) -> None:
    observation = observe(20)
    attention = observation.attention(window)
    torch.testing.assert_close(observation.attention_moment(window, "max"), attention.amax((2, 3)))
    torch.testing.assert_close(observation.attention_moment(window, "sum"), attention.sum((2, 3)))
    torch.testing.assert_close(observation.attention_moment(window, "square"), attention.square().sum((2, 3)))


@pytest.mark.parametrize("start", [0, 4, 19])
def test_key_statistics_are_of_the_tokens_from_a_start_on(start: int) -> None:
    observation = observe(20)
    mean, variance = observation.key_statistics(start)
    torch.testing.assert_close(mean, observation.keys[:, :, start:].mean(2))
    torch.testing.assert_close(variance, observation.keys[:, :, start:].var(2, correction=0))


def test_plain_pytorch_where_there_is_no_gpu() -> None:
    assert observe(4)._kernels() is naive_window


@pytest.mark.skipif(not ON_GPU, reason="choice of a GPU")
def test_triton_where_it_can_run() -> None:
    window = pytest.importorskip("rdkv.kernels.window")
    for dtype in window.DTYPES:
        assert observe(4, "cuda", dtype)._kernels() is window
    assert observe(4, "cuda", torch.float64)._kernels() is naive_window


@pytest.mark.skipif(not ON_GPU, reason="waiting for a GPU")
@pytest.mark.parametrize("moment", ["max", "sum", "square"])
def test_gpu_is_not_waited_for(moment: str) -> None:
    observation = observe(40, "cuda", torch.bfloat16)
    observation.attention_moment(8, moment)  # type: ignore[arg-type]
    observation.key_statistics(4)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        observation.attention_moment(8, moment)  # type: ignore[arg-type]
        observation.key_statistics(4)
        observation.visible(8)
        list(observation.attention_chunks(8))
    finally:
        torch.cuda.set_sync_debug_mode("default")
