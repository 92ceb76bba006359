"""Fused decode attention against float64 and its plain PyTorch twin: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packs import DEVICE, KEY_WIDTHS, VALUE_WIDTHS, to_device
from torch import Tensor

from rdkv.kernels import naive, naive_decode, naive_pack
from rdkv.kernels.packed import Packed, join
from rdkv.kernels.tail import Tail

pytest.importorskip("triton")
from rdkv.kernels.decode import attend, plan
from rdkv.kernels.decode_plan import Tile

BOUND = 2e-3  # of the output, relative, over all queries; 2e-4 to 5e-4 are reached
quick = settings(
    max_examples=60 if DEVICE == "cuda" else 8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
pytestmark = pytest.mark.usefixtures("poison")
SMALL = Tile(16, 16, 16, 16, True, warps=1, registers=None, resident=1)


@dataclass(frozen=True)
class Case:
    packed: Packed
    query: Tensor
    tail: Tail | None = None

    @property
    def scale(self) -> float:
        return float(self.packed.dim**-0.5)


def make_case(
    batch: int = 1,
    heads: int = 2,
    group: int = 4,
    tokens: int = 150,
    dim: int = 64,
    shares: tuple[float, ...] = (0.3, 0.3, 0.2, 0.15, 0.05),
    key_shares: tuple[float, ...] = (0.2, 0.3, 0.2, 0.1, 0.1, 0.1),
    pinned: int = 3,
    tail: int = 0,
    queries: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    rotate: bool = True,
) -> Case:
    """Keys off centre with channels of different spread; shares are of `VALUE_WIDTHS` and of `KEY_WIDTHS`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def bits(widths: Tensor, shares: tuple[float, ...], *size: int) -> Tensor:
        place = torch.multinomial(torch.tensor(shares), size[0] * size[1] * size[2], True, generator=generator)
        return widths[place].reshape(size)

    spread = 0.3 + 2 * torch.rand(1, heads, 1, dim, generator=generator)
    keys, values = (
        normal(batch, heads, tokens, dim) * spread + normal(1, heads, 1, dim),
        normal(batch, heads, tokens, dim),
    )
    is_pinned = (torch.arange(tokens) < pinned).expand(batch, heads, tokens)
    value_bits, key_bits = (
        bits(VALUE_WIDTHS, shares, batch, heads, tokens),
        bits(KEY_WIDTHS, key_shares, batch, heads, dim),
    )
    packed = naive_pack.pack(keys.to(dtype), values.to(dtype), value_bits, key_bits, is_pinned, rotate)
    query = normal(batch, heads * group, queries, dim).to(DEVICE, torch.bfloat16)
    held = None
    if tail:
        lengths = torch.randint(0, tail + 1, (batch,), generator=generator)
        buffers = [normal(batch, heads, tail + 5, dim).to(DEVICE, dtype) for _ in range(2)]
        for buffer in buffers:  # what is not written yet may be anything
            for row, length in zip(buffer, lengths.tolist(), strict=True):
                row[:, length:] = float("nan")
        held = Tail(buffers[0], buffers[1], lengths.to(DEVICE, torch.int32))
    return Case(to_device(packed), query, held)


def reference(case: Case) -> tuple[Tensor, Tensor]:
    """Attention over what is stored, in float64."""
    packed, query = case.packed, case.query.double().cpu()
    view = (packed.batch, packed.heads, packed.slots)
    keys, values, held = (t.cpu() for t in naive_pack.unpack(packed))
    keys, values = (t.double().reshape(*view, packed.dim) for t in (keys, values))
    held = held.reshape(view)
    if case.tail is not None:
        keys = torch.cat([keys, case.tail.keys.double().cpu().nan_to_num()], 2)
        values = torch.cat([values, case.tail.values.double().cpu().nan_to_num()], 2)
        written = torch.arange(case.tail.keys.shape[2]) < case.tail.lengths.cpu()[:, None, None]
        held = torch.cat([held, written.expand(*view[:2], -1)], 2)
    grouped = query.reshape(packed.batch, packed.heads, -1, packed.dim)  # [B, H, G * Q, D]
    logits = (grouped @ keys.transpose(-1, -2) * case.scale).masked_fill(~held.unsqueeze(2), float("-inf"))
    lse = logits.logsumexp(-1)
    output = torch.exp(logits - lse.masked_fill(lse.isinf(), 0.0).unsqueeze(-1)) @ values
    return output.reshape(query.shape), (lse * naive.LOG2_E).reshape(query.shape[:3])


def check(case: Case, tile: Tile | None = None, capacity: int | None = None) -> float:
    """The relative error of the fused kernel; raises where it is out of bounds."""
    reach = capacity if capacity is not None else 0 if case.tail is None else case.tail.keys.shape[2]
    output, lse = attend(case.query, case.packed, plan(case.packed, reach, tile), case.scale, case.tail)
    expected, expected_lse = reference(case)
    output, lse = output.double().cpu(), lse.double().cpu()
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    assert bool((output[expected_lse.isinf()] == 0).all())
    finite = expected_lse.isfinite()
    torch.testing.assert_close(lse[finite], expected_lse[finite], rtol=0, atol=2e-2)
    error = float((output - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error < BOUND
    return error


@quick
@given(
    batch=st.sampled_from([1, 2, 3]),
    heads=st.sampled_from([1, 2, 5]),
    group=st.sampled_from([1, 3, 4, 5, 6, 7, 8, 16]),
    tokens=st.integers(1, 200),
    dim=st.sampled_from([64, 96, 128, 80, 33]),
    pinned=st.integers(0, 5),
    tail=st.sampled_from([0, 0, 1, 40]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1 << 16),
)
def test_any_shape(**shape: Any) -> None:
    check(make_case(**shape))


ONE_WIDTH = {int(bits): tuple(map(float, bits == VALUE_WIDTHS)) for bits in VALUE_WIDTHS}
ONE_KEY_WIDTH = {int(bits): tuple(map(float, bits == KEY_WIDTHS)) for bits in KEY_WIDTHS}


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("key_bits", [0, 2, 6, 8, 16])
def test_one_width(bits: int, key_bits: int) -> None:
    check(make_case(tokens=140, shares=ONE_WIDTH[bits], key_shares=ONE_KEY_WIDTH[key_bits]))


@pytest.mark.parametrize("dim", [64, 96])
def test_values_as_they_are(dim: int) -> None:
    """Without a rotation, which the merge undoes elsewhere."""
    case = make_case(dim=dim, tail=9, rotate=False)
    assert case.packed.span == 1
    check(case)


def test_twin() -> None:
    case = make_case(batch=2, tail=30, tokens=300)
    output, lse = naive_decode.attend(case.query, case.packed, case.scale, replace_nan(case.tail))
    expected, expected_lse = reference(case)
    torch.testing.assert_close(output.double().cpu(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=1e-5, atol=1e-4)


def replace_nan(tail: Tail | None) -> Tail | None:
    return tail and Tail(tail.keys.nan_to_num(), tail.values.nan_to_num(), tail.lengths)


def test_nothing_held() -> None:
    case = make_case(shares=ONE_WIDTH[0], pinned=0)
    output, lse = attend(case.query, case.packed, plan(case.packed), case.scale)
    assert bool((output == 0).all())
    assert bool((lse == float("-inf")).all())
    check(replace(make_case(shares=ONE_WIDTH[0], pinned=0, tail=20)))


def test_an_empty_head_beside_a_full_one() -> None:
    full, empty = make_case(heads=1, tokens=90).packed, make_case(heads=1, shares=ONE_WIDTH[0], pinned=0).packed
    packed = replace(join([full, empty], [0, 1]), batch=1, heads=2)
    check(Case(packed, torch.randn(1, 8, 1, 64).to(DEVICE, torch.bfloat16)))


def test_unequal_lengths_in_one_launch() -> None:
    parts = [make_case(tokens=tokens, seed=tokens).packed for tokens in (1, 77, 200)]
    packed = join(parts, [2, 0, 1])
    query = torch.randn(3, 8, 1, 64, device=DEVICE, dtype=torch.bfloat16)
    check(Case(packed, query))
    output, _ = attend(query, packed, plan(packed), 0.125)
    alone, _ = attend(query[:1], parts[2], plan(parts[2]), 0.125)
    torch.testing.assert_close(output[:1], alone, rtol=1e-3, atol=1e-4)


def test_parts_of_the_same_sequences() -> None:
    """Sequences beyond those of the queries continue them: a prompt of two, then two blocks of both."""
    prompt = make_case(batch=2, tokens=150, tail=30)
    blocks = [make_case(batch=2, tokens=64, pinned=pinned, seed=seed) for pinned, seed in ((0, 1), (2, 2))]
    packed = join([prompt.packed, *(block.packed for block in blocks)], range(6))
    assert prompt.tail is not None
    written = replace(prompt.tail, keys=prompt.tail.keys.nan_to_num(), values=prompt.tail.values.nan_to_num())
    for tail in (None, written):
        items = plan(packed, 0 if tail is None else tail.keys.shape[2], sequences=2)
        output, lse = attend(prompt.query, packed, items, prompt.scale, tail)
        expected = reference(replace(prompt, tail=tail))
        for block in blocks:
            others = reference(replace(block, query=prompt.query))
            expected = naive.merge_states(*expected, *others)
        torch.testing.assert_close(lse.double().cpu(), expected[1], rtol=0, atol=2e-2)
        assert float((output.double().cpu() - expected[0]).norm() / expected[0].norm()) < BOUND
        twin, _ = naive_decode.attend(prompt.query, packed, prompt.scale, tail)
        assert float((twin.double().cpu() - expected[0]).norm() / expected[0].norm()) < BOUND
    with pytest.raises(ValueError, match="does not fit the plan's 6 sequences"):
        attend(prompt.query, packed, plan(packed), prompt.scale)


def test_a_batch_of_33() -> None:
    check(make_case(batch=33, heads=1, group=2, tokens=12, tail=3))


def test_many_items_of_a_row_and_more_columns_than_are_kept() -> None:
    case = make_case(heads=1, tokens=1300, key_shares=(0, 0, 0.2, 0, 0.4, 0.4))
    tile = replace(SMALL, resident=4)
    assert plan(case.packed, 0, tile).items.shape[0] > 8
    check(case, tile)


@pytest.mark.parametrize("dim", [128, 256])
def test_large_heads(dim: int) -> None:
    check(make_case(heads=1, dim=dim, tokens=270, tail=4))


@pytest.mark.parametrize(("group", "queries"), [(4, 4), (3, 11), (16, 2), (1, 20)])
def test_several_queries(group: int, queries: int) -> None:
    check(make_case(heads=1, group=group, queries=queries, tokens=100))


def test_a_tail_that_grows_within_its_plan() -> None:
    """One plan serves every length of the tail, as a captured graph needs."""
    case = make_case(tail=600, batch=2)
    assert case.tail is not None
    items = plan(case.packed, 605)
    for length in (0, 257, 600):
        keys = torch.randn_like(case.tail.keys.float()).to(case.tail.keys.dtype)
        tail = Tail(keys, keys, torch.tensor([length, length // 2], dtype=torch.int32, device=DEVICE))
        output, _ = attend(case.query, case.packed, items, case.scale, tail)
        expected, _ = reference(replace(case, tail=tail))
        assert float((output.double().cpu() - expected).norm() / expected.norm()) < BOUND


def test_large_magnitudes() -> None:
    """Scales far from 1 stay within float16 where codes and queries meet."""
    case = make_case(tokens=120)
    query = case.query * 300
    for factor in (1e-3, 200.0):
        data = torch.randn(1, 2, 120, 64) * factor
        bits = torch.full((1, 2, 120), 4, dtype=torch.uint8)
        packed = naive_pack.pack(
            data.half(), data.half(), bits, bits[:, :, :64].clone(), torch.zeros(1, 2, 120, dtype=torch.bool)
        )
        check(Case(to_device(packed), query if factor < 1 else case.query / 1000))


@pytest.mark.parametrize("size", [0.0, 1e-38])
def test_queries_of_next_to_nothing_share_evenly(size: float) -> None:
    """As those of a padding token, whose embedding is zero, beside others."""
    case = make_case(tokens=150)  # a last tile that is not full
    query = case.query.clone()
    query[:, ::3] *= size
    check(replace(case, query=query))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA graph")
def test_replays_in_a_graph_without_waiting() -> None:
    case = make_case(batch=2, tail=40, tokens=400)
    assert case.tail is not None
    tail = Tail(case.tail.keys.nan_to_num(), case.tail.values.nan_to_num(), case.tail.lengths.clone())
    items = plan(case.packed, tail.keys.shape[2])
    attend(case.query, case.packed, items, case.scale, tail)  # compile
    torch.cuda.set_sync_debug_mode("error")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = attend(case.query, case.packed, items, case.scale, tail)
    torch.cuda.set_sync_debug_mode("default")
    for lengths in ([0, 3], [40, 17]):
        tail.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        expected, _ = reference(replace(case, tail=tail))
        assert float((output.double().cpu() - expected).norm() / expected.norm()) < BOUND


def test_errors_name_the_shapes() -> None:
    case = make_case(tail=4)
    with pytest.raises(ValueError, match="does not fit the plan's 1 sequences of 2 KV heads of 64 channels"):
        attend(case.query[..., :32], case.packed, plan(case.packed), 1.0)
    with pytest.raises(ValueError, match="the plan covers a tail of 0 tokens, not 9"):
        attend(case.query, case.packed, plan(case.packed), 1.0, case.tail)
    with pytest.raises(ValueError, match="2 queries at once"):
        attend(case.query.repeat(1, 1, 2, 1), case.packed, plan(case.packed, 9), 1.0, case.tail)
