"""The window's kernels and their twin in plain PyTorch against float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdkv.kernels import naive_window
from rdkv.runtime.observation import Observation

pytest.importorskip("triton")
from rdkv.kernels import window

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
MOMENTS = ["max", "sum", "square"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KERNELS = [window, naive_window]
quick = settings(
    max_examples=15,  # on a GPU, too, where most examples are kernels to compile
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# The interpreter computes with NumPy, which says of NaN and infinities what no GPU does.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poison")]


def draw(
    batch: int, heads: int, groups: int, width: int, tokens: int, dim: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Window queries ``[B, H, G, W, D]`` and keys ``[B, H, T, D]`` off centre, as views like a model's."""
    generator = torch.Generator().manual_seed(seed)
    queries = 2 * torch.randn(batch, tokens, heads * groups, dim, generator=generator)
    keys = torch.randn(batch, tokens, heads, dim, generator=generator) + torch.linspace(-3, 3, dim)
    observation = Observation(
        *(t.to(DEVICE, dtype).transpose(1, 2) for t in (keys, keys, queries)), scale=dim**-0.5, layer=0
    )
    return observation.window_queries(width), observation.keys


def reference(queries: Tensor, keys: Tensor, scale: float, moment: str) -> Tensor:
    """The moments in float64."""
    width, tokens = queries.shape[3], keys.shape[2]
    logits = scale * torch.einsum("bhgwd,bhtd->bhgwt", queries.double(), keys.double())
    positions = torch.arange(tokens, device=keys.device)
    weights = logits.masked_fill(positions > positions[tokens - width :, None], float("-inf")).softmax(-1)
    if moment == "max":
        return weights.amax((2, 3))
    return (weights if moment == "sum" else weights.square()).sum((2, 3))


def check_moments(kernels: ModuleType, queries: Tensor, keys: Tensor, moment: str) -> None:
    scale = keys.shape[-1] ** -0.5
    actual = kernels.token_moments(queries, keys, scale, moment)
    expected = reference(queries, keys, scale, moment)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("moment", MOMENTS)
@quick
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 3, 5, 8]),
    width=st.integers(1, 33),
    more=st.sampled_from([0, 1, 31, 63, 64, 65, 130]),
    dim=st.sampled_from([16, 64, 80, 96, 128, 256]),
    dtype=st.sampled_from(DTYPES),
)
@example(batch=1, heads=1, groups=1, width=1, more=0, dim=64, dtype=torch.float16)
@example(batch=2, heads=2, groups=5, width=32, more=33, dim=96, dtype=torch.bfloat16)  # two blocks of queries
def test_token_moments(
    kernels: ModuleType, moment: str, batch: int, heads: int, groups: int, width: int, more: int, dim: int, dtype: Any
) -> None:
    queries, keys = draw(batch, heads, groups, width, width + more, dim, dtype)
    check_moments(kernels, queries, keys, moment)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("programs", [1, 5, 4096])
def test_however_many_programs_share_a_prompt(moment: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "PROGRAMS", programs)
    queries, keys = draw(1, 1, 2, 4, 700, 16, torch.float16)
    check_moments(window, queries, keys, moment)
    check_statistics(window, keys)


@pytest.mark.skipif(not ON_GPU, reason="too long for the interpreter")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("groups", [1, 3, 4, 7, 16])
def test_long_prompts(moment: str, dim: int, groups: int) -> None:
    queries, keys = draw(1, 2, groups, 32, 20_000, dim, torch.bfloat16)
    check_moments(window, queries, keys, moment)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("groups", [1, 5])
def test_what_is_not_finite_is_not_hidden(kernels: ModuleType, moment: str, groups: int) -> None:
    for value in (float("nan"), float("inf")):
        queries, keys = draw(1, 2, groups, 32, 70, 16, torch.float16)
        one = queries.clone()
        one[0, 0, -1, 3, 2] = value  # of one query of many
        assert bool(kernels.token_moments(one, keys, 0.25, moment)[0, 0, :40].isnan().all())
        assert bool(kernels.token_moments(one, keys, 0.25, moment)[0, 1].isfinite().all())
        one = keys.clone()
        one[0, 0, 5, 2] = value
        assert bool(kernels.token_moments(queries, one, 0.25, moment)[0, 0].isnan().any())


def test_large_logits_do_not_overflow() -> None:
    queries, keys = draw(1, 1, 2, 8, 100, 64, torch.bfloat16)
    actual = window.token_moments(30 * queries, 30 * keys, 1.0, "max")
    expected = reference(30 * queries, 30 * keys, 1.0, "max")
    torch.testing.assert_close(actual.double(), expected, rtol=0.0, atol=0.02)  # float32 logits of some 1e5


@pytest.mark.parametrize("kernels", KERNELS)
def test_strided_last_dimension(kernels: ModuleType) -> None:
    queries, keys = draw(1, 2, 2, 8, 50, 64, torch.float16)
    for moment in MOMENTS:
        check_moments(kernels, queries[..., ::2], keys[..., ::2], moment)
    check_statistics(kernels, keys[..., ::2])


def check_statistics(kernels: ModuleType, keys: Tensor) -> None:
    mean, variance = kernels.key_statistics(keys)
    exact = keys.double()
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean.double(), exact.mean(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance.double(), exact.var(2, correction=0), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kernels", KERNELS)
@quick
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 31, 32, 33, 64, 333]),
    start=st.integers(0, 4),
    dim=st.sampled_from([16, 64, 80, 96, 128, 256]),
    dtype=st.sampled_from(DTYPES),
)
def test_key_statistics(
    kernels: ModuleType, batch: int, heads: int, tokens: int, start: int, dim: int, dtype: torch.dtype
) -> None:
    _, keys = draw(batch, heads, 1, 1, tokens + start, dim, dtype)
    check_statistics(kernels, keys[:, :, start:])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("mean", [50.0, -1000.0])
def test_variance_of_keys_far_from_zero(kernels: ModuleType, dtype: torch.dtype, mean: float) -> None:
    tokens = 100_000 if ON_GPU else 2000
    noise = torch.randn(1, 1, tokens, 16, generator=torch.Generator().manual_seed(0))
    keys = (mean + 0.5 * noise).to(DEVICE, dtype)
    actual, exact = kernels.key_statistics(keys)[1].double(), keys.double().var(2, correction=0)
    torch.testing.assert_close(actual, exact, rtol=2e-5, atol=0.0)


def test_constant_channels_have_no_variance() -> None:
    for kernels in KERNELS:
        mean, variance = kernels.key_statistics(torch.full((1, 2, 300, 64), 7.25, device=DEVICE))
        assert float(variance.max()) < 1e-10
        torch.testing.assert_close(mean, torch.full_like(mean, 7.25))


def test_chunks_keep_to_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = draw(2, 4, 2, 8, 40, 16, torch.float32)
    whole = naive_window.token_moments(queries, keys, 0.25, "sum")
    for elements, chunks in ((1, 4), (2 * 2 * 8 * 40 * 3, 2), (1 << 20, 1)):
        monkeypatch.setattr(naive_window, "CHUNK_ELEMENTS", elements)
        assert len(list(naive_window.attention_chunks(queries, keys, 0.25))) == chunks
        torch.testing.assert_close(naive_window.token_moments(queries, keys, 0.25, "sum"), whole)
        check_statistics(naive_window, keys)


@pytest.mark.skipif(not ON_GPU, reason="memory of a GPU")
def test_memory_beyond_inputs_and_outputs() -> None:
    queries, keys = draw(1, 8, 4, 32, 32_768, 128, torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = window.token_moments(queries, keys, 0.1, "max")
    window.key_statistics(keys)
    assert torch.cuda.max_memory_allocated() - before - out.nbytes < 4 << 20
