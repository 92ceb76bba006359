"""Reference kernels against their definitions: bits, the affine quantiser, attention and merged states."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdkv.kernels import naive

BITS = [1, 2, 4, 8]
quick = settings(max_examples=50, deadline=None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@quick
@given(st.sampled_from(BITS), st.integers(0, 3), st.integers(0, 37), st.integers(0, 2**31))
def test_packed_bits_are_those_of_one_big_number(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = naive.pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, math.ceil(count * bits / 8))
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (bits * i) for i, code in enumerate(row))  # unused high bits are 0
        assert bytes(stored) == number.to_bytes(len(stored), "little")
    assert torch.equal(naive.unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
def test_packing_keeps_leading_dimensions(bits: int) -> None:
    codes = torch.randint(2**bits, (2, 3, 5, 7), dtype=torch.uint8)
    packed = naive.pack_bits(codes, bits)
    assert packed.shape == (2, 3, 5, math.ceil(7 * bits / 8))
    assert torch.equal(naive.unpack_bits(packed, bits, 7), codes)
    assert torch.equal(naive.pack_bits(codes.transpose(0, 1), bits), packed.transpose(0, 1))


# Up to half of float16's range: the distance of two of them still has a float16 step at 1 bit.
finite = st.floats(-30000, 30000, width=32, allow_subnormal=True)
tiny = st.floats(-(2.0**-20), 2.0**-20, width=32, allow_subnormal=True)


@st.composite
def ranges(draw: st.DrawFn) -> list[float]:
    """Numbers to quantise together: anything, almost nothing, or close neighbours far from 0."""
    kind = draw(st.sampled_from(["any", "tiny", "offset"]))
    if kind == "offset":
        center = draw(finite)
        return [center * (1 + 1e-6 * x) for x in draw(st.lists(st.integers(-9, 9), min_size=1, max_size=12))]
    return draw(st.lists(finite if kind == "any" else tiny, min_size=1, max_size=12))


@settings(max_examples=150, deadline=None)
@given(ranges(), st.sampled_from([2, 4, 8, 16]))
@example([0.0], 2)
@example([-0.0, -0.0], 4)
@example([1000.3], 2)  # a constant between two float16 numbers
@example([-1e-9], 2)  # below the smallest float16
@example([1e-9, 2e-9], 8)
@example([1e-45, -1e-45], 4)
@example([-30000.0, 30000.0], 2)
@example([65504.0, 65504.0], 4)
@example([-65504.0, 65504.0], 2)
def test_quantiser_covers_its_range(numbers: list[float], bits: int) -> None:
    x = torch.tensor(numbers)
    scale, zero = naive.affine_parameters(x.amin(), x.amax(), bits)
    assert scale.dtype == zero.dtype == torch.float16
    assert bool(scale >= 0)
    codes = naive.quantize(x, scale, zero, bits)
    assert int(codes.max()) < 2**bits
    restored = (codes * scale.float() + zero.float()).double()
    # Half a step, but for float32's own rounding; processors may take its subnormal numbers for 0.
    slack = 1e-6 * max(x.abs().max().item(), zero.float().abs().item()) + 2.0**-126
    assert ((x.double() - restored).abs() <= scale.double() / 2 + slack).all()


@quick
@given(ranges(), st.sampled_from([2, 4, 8, 16]))
def test_quantiser_wastes_no_more_than_rounding_to_float16(numbers: list[float], bits: int) -> None:
    x = torch.tensor(numbers)
    low, high = x.amin(), x.amax()
    scale, zero = naive.affine_parameters(low, high, bits)
    assert bool(zero.float() <= low)
    ulp = 2.0**-10 * max(low.abs().item(), 2.0**-14)  # distance of two float16 numbers there, or more
    assert (low - zero.float()).item() <= ulp
    ideal = (high.double() - zero.double()).item() / (2**bits - 1)
    assert scale.item() <= ideal * (1 + 2.0**-9) + 2.0**-24


def test_quantiser_uses_every_code() -> None:
    for bits in (2, 4, 8, 16):
        x = torch.arange(2**bits).float()
        scale, zero = naive.affine_parameters(x.amin(), x.amax(), bits)
        assert torch.equal(naive.quantize(x, scale, zero, bits), x.int())


def test_scale_of_zero_gives_code_zero() -> None:
    x = torch.full((3,), 0.5)
    scale, zero = naive.affine_parameters(x.amin(), x.amax(), 4)
    assert (scale.item(), zero.item()) == (0.0, 0.5)
    assert naive.quantize(x, scale, zero, 4).tolist() == [0, 0, 0]


@pytest.mark.parametrize("extreme", [float("nan"), float("inf"), -float("inf"), 1e9, -1e9])
def test_range_beyond_float16_has_no_finite_parameters(extreme: float) -> None:
    x = torch.tensor([0.0, extreme])
    scale, zero = naive.affine_parameters(x.amin(), x.amax(), 2)
    assert not bool(scale.isfinite() & zero.isfinite())


def attention_double(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention in float64, one query at a time, with its log-sum-exp to base 2."""
    batch, q_heads, length, _ = query.shape
    heads, slots = keys.shape[1:3]
    output = torch.zeros(batch, q_heads, length, values.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, q_heads, length), -math.inf, dtype=torch.float64)
    seen = torch.ones(batch, heads, length, slots, dtype=torch.bool)
    if visible is not None:
        seen = visible.expand(batch, heads, length, slots)
    for b in range(batch):
        for h in range(q_heads):
            kv = h * heads // q_heads
            for i in range(length):
                mask = seen[b, kv, i]
                if not bool(mask.any()):
                    continue
                logits = scale * (keys[b, kv, mask].double() @ query[b, h, i].double())
                output[b, h, i] = logits.softmax(0) @ values[b, kv, mask].double()
                lse[b, h, i] = logits.logsumexp(0) / math.log(2)
    return output, lse


def close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


Mask = Callable[[int, int, int, int], Tensor | None]
MASKS: dict[str, Mask] = {
    "none": lambda b, h, q, n: None,
    "causal": lambda b, h, q, n: torch.arange(n) <= torch.arange(n - q, n)[:, None],
    "slots": lambda b, h, q, n: torch.arange(n) < torch.arange(b * h).reshape(b, h, 1, 1) % (n + 1),
    "random": lambda b, h, q, n: torch.rand(b, h, q, n, generator=torch.Generator().manual_seed(1)) < 0.4,
}


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "length", "slots", "dim"),
    [(1, 1, 1, 1, 1, 1), (2, 3, 1, 1, 17, 5), (1, 2, 3, 4, 9, 16), (3, 2, 4, 7, 33, 80), (2, 2, 2, 5, 5, 96)],
)
@pytest.mark.parametrize("chunk", [1, 300, 1 << 24])
def test_attention(
    mask: str, batch: int, heads: int, groups: int, length: int, slots: int, dim: int, chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(naive, "CHUNK_ELEMENTS", chunk)
    query = 3 * normal(batch, heads * groups, length, dim)
    keys, values = normal(2, batch, heads, slots, dim, seed=1)
    visible = MASKS[mask](batch, heads, length, slots)
    result = naive.attention(query, keys, values, dim**-0.5, visible)
    close(result, attention_double(query, keys, values, dim**-0.5, visible))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    query, keys, values = (gain * normal(1, 2, 6, 64, seed=i) for i, gain in enumerate((30, 30, 1)))
    query, keys, values = query.to(dtype), keys.to(dtype), values.to(dtype)
    close(naive.attention(query, keys, values, 0.125), attention_double(query, keys, values, 0.125))


def test_attention_of_huge_logits_does_not_overflow() -> None:
    query, keys, values = 1e4 * normal(1, 1, 3, 8), 1e4 * normal(1, 1, 4, 8, seed=1), normal(1, 1, 4, 8, seed=2)
    close(naive.attention(query, keys, values, 1.0), attention_double(query, keys, values, 1.0))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_over_nothing(masked: bool) -> None:
    slots = 3 if masked else 0
    keys = normal(2, 2, slots, 8)
    visible = torch.zeros(2, 2, 1, slots, dtype=torch.bool) if masked else None
    output, lse = naive.attention(normal(2, 4, 5, 8), keys, keys, 1.0, visible)
    assert output.shape == (2, 4, 5, 8)
    assert bool((output == 0).all())
    assert lse.shape == (2, 4, 5)
    assert bool((lse == -math.inf).all())


@quick
@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 30.0]))
@example(0, 0, 0, 1.0)
@example(0, 4, 0, 1.0)
@example(4, 0, 0, 1.0)
def test_merged_states_are_attention_over_the_union(first: int, second: int, seed: int, gain: float) -> None:
    query = gain * normal(2, 4, 3, 8, seed=seed)
    keys, values = normal(2, 2, 2, first + second, 8, seed=seed + 1)
    parts = [slice(0, first), slice(first, None)]
    (a, lse_a), (b, lse_b) = (naive.attention(query, keys[:, :, p], values[:, :, p], 1.0) for p in parts)
    close(naive.merge_states(a, lse_a, b, lse_b), attention_double(query, keys, values, 1.0))


def test_merging_with_an_empty_set_changes_nothing() -> None:
    query = normal(1, 2, 3, 8)
    keys, values = normal(2, 1, 2, 5, 8, seed=1)
    output, lse = naive.attention(query, keys, values, 1.0)
    nothing = torch.zeros_like(output), torch.full_like(lse, -math.inf)
    for merged in (naive.merge_states(output, lse, *nothing), naive.merge_states(*nothing, output, lse)):
        assert torch.equal(merged[0], output)
        assert torch.equal(merged[1], lse)
    both = naive.merge_states(*nothing, *nothing)
    assert torch.equal(both[0], nothing[0])
    assert torch.equal(both[1], nothing[1])


def test_states_of_very_different_weight_merge_without_overflow() -> None:
    output_a, output_b = normal(4, 8), normal(4, 8, seed=1)
    lse_a, lse_b = torch.tensor([3e4, -3e4, 0.0, 5.0]), torch.tensor([-3e4, 3e4, 0.0, 5.0])
    output, lse = naive.merge_states(output_a, lse_a, output_b, lse_b)
    torch.testing.assert_close(output, torch.stack([output_a[0], output_b[1], *((output_a + output_b)[2:] / 2)]))
    torch.testing.assert_close(lse, torch.tensor([3e4, 3e4, 1.0, 6.0]))
