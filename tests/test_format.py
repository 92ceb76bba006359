"""The mixed-bit format against a reference that packs nothing: one head, channel and token at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdkv.kernels import naive
from rdkv.plugins.rdkv.format import MixedBit, MixedBitOptions
from rdkv.plugins.rdkv.segment import MixedBitSegment
from rdkv.plugins.rdkv.whole import EmptySegment, WholeSegment
from rdkv.runtime.errors import ConfigError, PluginError
from rdkv.runtime.interfaces import PackedSegment
from rdkv.runtime.ladder import Distortion
from rdkv.runtime.plan import BitPlan

WIDTHS = (0, 2, 4, 8, 16)
quick = settings(max_examples=80, deadline=None)
Row = tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.float32]]]


@dataclass(frozen=True)
class Case:
    """Keys, values and the plan to pack them with. Evicted tokens are NaN: nothing of them may be left."""

    keys: Tensor
    values: Tensor
    plan: BitPlan

    @property
    def apart(self) -> Tensor:
        """Tokens stored as they are, before the others: pinned ones, and all of a head whose widths are all 16."""
        plan = self.plan
        whole = ~plan.kept | plan.pinned | (plan.value_bits == 16)
        nothing_to_quantise = whole.all(-1, keepdim=True) & (plan.key_bits == 16).all(-1, keepdim=True)
        return plan.pinned | plan.kept & nothing_to_quantise

    def pack(self, **options: Any) -> PackedSegment:
        return MixedBit(MixedBitOptions(**options)).pack(self.keys, self.values, self.plan)


def make_case(
    value_bits: Tensor, key_bits: Tensor, pinned: Tensor, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Case:
    """Random keys and values for a plan: channels off centre, some constant, pinned tokens outliers."""
    generator = torch.Generator().manual_seed(seed)
    tokens, dim = value_bits.shape[2], key_bits.shape[2]
    keys, values = torch.randn(2, *value_bits.shape, dim, generator=generator)
    offset, spread = torch.randn(2, 1, 1, 1, dim, generator=generator)
    keys = keys * (2 * spread.clamp(-3, 3)).exp() + 10 * offset  # within float16
    keys[..., ::11] = keys[:, :, :1, ::11].expand(-1, -1, tokens, -1)
    keys, values = keys.masked_fill(pinned.unsqueeze(3), 3e4), values.masked_fill(pinned.unsqueeze(3), -3e4)
    evicted = ~pinned & (value_bits == 0)
    keys, values = (t.masked_fill(evicted.unsqueeze(3), float("nan")).to(dtype) for t in (keys, values))
    return Case(keys, values, BitPlan(value_bits.byte(), key_bits.byte(), pinned))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Every width at once, or one for all; heads without tokens; pinned tokens anywhere."""
    batch, heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 14))
    dim = draw(st.sampled_from([5, 32, 64, 80, 96, 128]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)

    def widths(count: int) -> Tensor:
        allowed = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=5, unique=True))
        pick = torch.randint(len(allowed), (batch, heads, count), generator=generator)
        return torch.tensor(allowed)[pick]

    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))

    value_bits = widths(tokens).masked_fill(some(batch, heads, 1), 0)
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    return make_case(value_bits, widths(dim), some(batch, heads, tokens), seed, dtype)


def empty(batch: int, heads: int, tokens: int) -> Tensor:
    return torch.zeros(batch, heads, tokens, dtype=torch.bool)


ALL_WIDTHS = make_case(
    torch.tensor([[[16, 2, 0, 8, 4, 2, 16], [0, 0, 0, 4, 0, 0, 0]]]),
    torch.tensor(WIDTHS)[torch.arange(64) % 5].reshape(1, 2, 32),
    torch.tensor([[[True, False, False, False, False, True, False], [False] * 7]]),
)
ONE_TOKEN = make_case(torch.full((1, 1, 1), 2), torch.tensor(WIDTHS).repeat(1, 1, 16), empty(1, 1, 1))
ONLY_PINNED = make_case(torch.zeros(1, 2, 3), torch.full((1, 2, 80), 4), ~empty(1, 2, 3))
ONE_HEAD_RAW = make_case(  # the second head quantises nothing, the third nothing but values
    torch.tensor([[[2, 4, 8, 16], [0, 16, 16, 16], [16, 2, 0, 16]]]),
    torch.tensor([4, 16, 16])[None, :, None].expand(1, 3, 33),
    torch.tensor([[[False] * 4, [False, True, False, False], [False] * 4]]),
)
ONE_HEAD_EMPTY = make_case(torch.tensor([[[0, 0, 0, 0]], [[2, 4, 8, 16]]]), torch.full((2, 1, 96), 2), empty(2, 1, 4))


def half_below(x: float) -> np.float16:
    """The largest float16 that is at most ``x``."""
    half = np.float16(x)
    return np.nextafter(half, np.float16(-np.inf)) if np.float32(half) > np.float32(x) else half


def quantise(x: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """What is left of the numbers ``x`` at one scale; checks that it is within half a step of each."""
    zero = np.float32(half_below(x.min()))
    scale = np.float32(-half_below(-(x.max() - zero) / np.float32(2**bits - 1)))
    codes = np.round((x - zero) / scale) if scale > 0 else np.zeros_like(x)
    restored = codes.clip(0, 2**bits - 1) * scale + zero
    slack = 2e-6 * np.abs(x).max()
    assert (np.abs(restored.astype(np.float64) - x) <= np.float64(scale) / 2 + slack).all()
    return restored.astype(np.float32)


def reference(case: Case) -> list[list[Row]]:
    """``[b][h]`` of the kept tokens' keys and values: those apart, then by width 8, 4, 2, 16, then by position."""
    plan = case.plan
    batch, heads, tokens, dim = case.keys.shape
    result: list[list[Row]] = []
    for b in range(batch):
        result.append([])
        for h in range(heads):
            keys, values = case.keys[b, h].float().numpy(), case.values[b, h].float().numpy()
            bits = plan.value_bits[b, h].tolist()
            pinned = [t for t in range(tokens) if case.apart[b, h, t]]
            coded = [t for w in (16, 8, 4, 2) for t in range(tokens) if t not in pinned and bits[t] == w]
            kept_keys = np.empty((len(coded), dim), np.float32)
            for c in range(dim if coded else 0):
                width, channel = int(plan.key_bits[b, h, c]), keys[coded, c]
                kept_keys[:, c] = quantise(channel, width) if width else channel.astype(np.float64).mean()
            kept_values = [quantise(values[t], bits[t]) for t in coded]
            result[-1].append(
                (
                    np.concatenate([keys[pinned], kept_keys]),
                    np.concatenate([values[pinned], np.reshape(kept_values, (-1, dim))]),
                )
            )
    return result


def held_tensors(item: object) -> Iterator[Tensor]:
    """Every tensor in the fields of a segment, found without its help."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, (tuple, list)):
        for part in item:
            yield from held_tensors(part)
    elif dataclasses.is_dataclass(item):
        for field in dataclasses.fields(item):
            yield from held_tensors(getattr(item, field.name))


@quick
@given(cases())
@example(ALL_WIDTHS)
@example(ONE_TOKEN)
@example(ONLY_PINNED)
@example(ONE_HEAD_EMPTY)
@example(ONE_HEAD_RAW)
def test_unpacks_as_the_reference(case: Case) -> None:
    keys, values, held = case.pack().unpack()
    assert keys.dtype == values.dtype == torch.float32
    expected = reference(case)
    slots = max(len(row[0]) for sequence in expected for row in sequence)
    assert held.shape == (*case.keys.shape[:2], slots)
    mean_precision = torch.finfo(torch.float16).eps / 2  # means are stored in 16 bits
    for b, sequence in enumerate(expected):
        for h, (row_keys, row_values) in enumerate(sequence):
            count, pins = len(row_keys), int(case.apart[b, h].sum())
            assert held[b, h].tolist() == [True] * count + [False] * (slots - count)
            actual_keys, actual_values = keys[b, h, :count], values[b, h, :count]
            width = case.plan.key_bits[b, h]
            assert torch.equal(actual_keys[:pins], torch.from_numpy(row_keys)[:pins])
            assert torch.equal(actual_values[:pins], torch.from_numpy(row_values)[:pins])
            np.testing.assert_allclose(actual_values, row_values, rtol=1e-6, atol=1e-6)
            coded = actual_keys[pins:], row_keys[pins:]
            largest = np.abs(row_keys[pins:]).max(0, initial=0.0)
            error = np.abs(coded[0].numpy() - coded[1])
            tolerance = np.where(width == 0, mean_precision + 1e-6, 1e-6) * largest + 1e-7
            assert (error <= tolerance).all()


def blocks(count: int) -> int:
    return -(-count // 16)


def expected_bytes(case: Case, positions: bool) -> tuple[int, int]:
    """Bytes of a packed case, and how many bits its ladder may promise beyond them."""
    plan, (tokens, dim) = case.plan, case.keys.shape[2:]
    if plan.is_identity or not bool(plan.kept.any()):
        return 4 * dim * int(plan.kept.sum()), 0
    total = spare = classes = 0
    for b, h in np.ndindex(*plan.value_bits.shape[:2]):
        bits, apart, key_bits = plan.value_bits[b, h], case.apart[b, h], int(plan.key_bits[b, h].sum())
        n, n4, n8, n16 = (int((~apart & (bits >= width)).sum()) for width in (2, 4, 8, 16))
        pins, raw = int(apart.sum()), int((apart & ~plan.pinned[b, h]).sum())
        columns = 16 * blocks(key_bits // 2) if n else 0
        planes = blocks(n) + blocks(n4) + 2 * blocks(n8) + 4 * blocks(n16)
        total += 4 * blocks(n) * columns + 2 * columns  # key words, columns
        total += 4 * dim * planes + 4 * n  # value words, affine
        total += 4 * dim * pins + 4 * dim + 8 * 4 + 5 * 8  # pinned, key affine, counts and starts
        classes += n + raw
        if positions:
            total += -(-tokens // 8) + 4 * (pins - raw)
        spare += 240 + 8  # key columns and the classes' bytes, at most
        if raw:  # keys and values that would have a scale, and whole columns
            spare += raw * (32 + -16 * dim % 32)
    return total + (-(-classes // 4) if positions else 0), spare


@quick
@given(cases(), st.integers(1, 40))
@example(ALL_WIDTHS, 7)
@example(ONE_TOKEN, 1)
@example(ONLY_PINNED, 1)
@example(ONE_HEAD_EMPTY, 5)
@example(ONE_HEAD_RAW, 5)
def test_bytes_are_counted_and_no_more_than_promised(case: Case, group: int) -> None:
    tokens, dim = case.keys.shape[2:]
    for positions in (True, False):
        options = MixedBitOptions(positions=positions, channel_group=group)
        segment = MixedBit(options).pack(case.keys, case.values, case.plan)
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held_tensors(segment)}
        assert segment.nbytes == sum(storages.values())
        expected, spare = expected_bytes(case, positions)
        assert segment.nbytes == expected
        cost = int(MixedBit(options).ladder(dim, tokens).cost(case.plan).sum())
        assert 0 <= cost - segment.nbytes * 8 <= spare


@quick
@given(cases())
@example(ALL_WIDTHS)
@example(ONLY_PINNED)
@example(ONE_HEAD_EMPTY)
@example(ONE_HEAD_RAW)
def test_plan_comes_back(case: Case) -> None:
    plan, packed = case.plan, case.pack().plan()
    coded = (plan.value_bits > 0) & ~plan.pinned
    assert packed.value_bits.dtype == packed.key_bits.dtype == torch.uint8
    assert torch.equal(packed.value_bits, plan.value_bits.masked_fill(plan.pinned, 16))
    if plan.is_identity:  # nothing is set apart where everything is kept
        assert not bool(packed.pinned.any())
        assert bool((packed.key_bits == 16).all())
        return
    assert torch.equal(packed.pinned, plan.pinned)
    assert torch.equal(packed.key_bits, plan.key_bits * coded.any(-1, keepdim=True))


@quick
@given(cases(), st.integers(1, 3), st.integers(1, 3))
@example(ALL_WIDTHS, 2, 1)
@example(ONE_HEAD_EMPTY, 2, 1)
@example(ONE_HEAD_RAW, 2, 1)
def test_attends_as_naive_attention_over_the_unpacked(case: Case, groups: int, length: int) -> None:
    batch, heads, _, dim = case.keys.shape
    query = torch.randn(batch, heads * groups, length, dim, generator=torch.Generator().manual_seed(1))
    segment = case.pack()
    output, lse = segment.attend(query, 0.01)
    keys, values, held = segment.unpack()
    for b in range(batch):
        for h in range(heads):
            part = slice(h * groups, h * groups + groups)
            own = held[b, h]
            alone = (t[b : b + 1, h : h + 1, own] for t in (keys, values))
            expected, expected_lse = naive.attention(query[b : b + 1, part], *alone, 0.01)
            # Products of outliers round differently in another order of summation.
            sums = query[b, part].abs() @ keys[b, h, own].abs().T
            noise = 0.01 * 2.0**-20 * (float(sums.max()) if sums.numel() else 0.0)
            top = float(values[b, h, own].abs().max()) if own.any() else 0.0
            torch.testing.assert_close(output[b : b + 1, part], expected, rtol=1e-4, atol=1e-3 + 4 * noise * top)
            torch.testing.assert_close(lse[b : b + 1, part], expected_lse, rtol=1e-5, atol=1e-4 + 2 * noise)


@quick
@given(cases())
def test_rows_are_independent(case: Case) -> None:
    keys, values, held = case.pack().unpack()
    for b in range(case.keys.shape[0]):
        part = slice(b, b + 1)
        plan = BitPlan(case.plan.value_bits[part], case.plan.key_bits[part], case.plan.pinned[part])
        alone = MixedBit().pack(case.keys[part], case.values[part], plan).unpack()
        for one, many in zip(alone[:2], (keys, values), strict=True):
            for h in range(held.shape[1]):
                assert torch.equal(one[0, h, alone[2][0, h]], many[b, h, held[b, h]])


def test_positions_can_be_dropped() -> None:
    kept, dropped = ALL_WIDTHS.pack(), ALL_WIDTHS.pack(positions=False)
    assert isinstance(dropped, MixedBitSegment)
    assert dropped.positions is None
    assert dropped.nbytes < kept.nbytes
    assert all(map(torch.equal, dropped.unpack(), kept.unpack()))
    with pytest.raises(ConfigError, match="positions=true"):
        dropped.plan()


def test_whole_segment_is_bit_exact_and_costs_the_full_cache() -> None:
    case = make_case(torch.full((2, 3, 5), 16), torch.full((2, 3, 80), 16), empty(2, 3, 5))
    segment = case.pack()
    assert isinstance(segment, WholeSegment)
    keys, values, held = segment.unpack()
    assert torch.equal(keys, case.keys.float())
    assert torch.equal(values, case.values.float())
    assert bool(held.all())
    assert segment.nbytes == 2 * 2 * 3 * 5 * 80 * 2
    assert segment.nbytes * 8 == int(MixedBit().ladder(80, 5).cost(case.plan).sum())
    assert segment.plan().is_identity


def test_whole_segment_survives_changes_to_what_it_was_packed_from() -> None:
    case = make_case(torch.full((1, 1, 5), 16), torch.full((1, 1, 32), 16), empty(1, 1, 5))
    segment = case.pack()
    before = case.keys.float()
    case.keys.zero_()
    assert torch.equal(segment.unpack()[0], before)


def test_empty_segment_holds_nothing() -> None:
    case = make_case(torch.zeros(2, 3, 5), torch.full((2, 3, 80), 4), empty(2, 3, 5))
    segment = case.pack()
    assert isinstance(segment, EmptySegment)
    assert segment.nbytes == 0
    assert int(MixedBit().ladder(80, 5).cost(case.plan).sum()) == 0
    keys, values, held = segment.unpack()
    assert keys.shape == values.shape == (2, 3, 0, 80)
    assert held.shape == (2, 3, 0)
    plan = segment.plan()
    assert plan.value_bits.shape == (2, 3, 5)
    assert plan.key_bits.shape == (2, 3, 80)
    assert not bool(plan.kept.any())
    output, lse = segment.attend(torch.randn(2, 6, 1, 80), 1.0)
    assert output.shape == (2, 6, 1, 80)
    assert not bool(output.any())
    assert bool((lse == -float("inf")).all())


def test_keys_of_a_short_head_do_not_see_the_padding_to_the_longest() -> None:
    value_bits = torch.tensor([[[2, 2, 2, 2], [0, 0, 0, 8]]])
    case = make_case(value_bits, torch.full((1, 2, 32), 2), empty(1, 2, 4))
    case.keys[0, 1, 3] = 5.0
    keys, _, held = case.pack().unpack()
    assert held[0, 1].tolist() == [True, False, False, False]
    assert torch.equal(keys[0, 1, 0], torch.full((32,), 5.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("what", ["keys", "values"])
def test_what_is_not_finite_is_named(bad: float, width: int, what: str) -> None:
    case = make_case(torch.full((1, 2, 4), width), torch.full((1, 2, 32), width), empty(1, 2, 4))
    getattr(case, what)[0, 1, 2, 3] = bad
    with pytest.raises(PluginError, match=f"{what} are not finite"):
        case.pack()


def test_mean_that_is_not_finite_is_named() -> None:
    case = make_case(torch.full((1, 1, 4), 16), torch.zeros(1, 1, 32), empty(1, 1, 4))
    case.keys[0, 0, 1, 2] = float("inf")
    with pytest.raises(PluginError, match="keys are not finite"):
        case.pack()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("what", "value", "key"), [("keys", 4, 16), ("values", 16, 4)])
def test_what_is_not_finite_at_16_bits_is_named(bad: float, what: str, value: int, key: int) -> None:
    case = make_case(torch.full((1, 1, 4), value), torch.full((1, 1, 32), key), empty(1, 1, 4))
    getattr(case, what)[0, 0, 1, 2] = bad
    with pytest.raises(PluginError, match=f"{what} are not finite"):
        case.pack()


@pytest.mark.parametrize("low", [-1.0, 0.0, 1000.0, -3e-5])
@pytest.mark.parametrize("span", [1e-6, 0.01, 1.0, 300.0, 60000.0])
def test_codes_of_16_bits_are_half_a_step_off_at_most(low: float, span: float) -> None:
    """``span / 131070``, and what rounding scale and zero point to float16 adds."""
    data = torch.rand(4, 32, generator=torch.Generator().manual_seed(0)) * span + low
    wider = span + max(2.0**-10 * abs(low), 2.0**-24)  # the zero point is up to one float16 number below
    bound = (wider / 65535 * (1 + 2.0**-10) + 2.0**-24) / 2 + 3e-7 * (abs(low) + span)  # and float32 rounds
    for value, key in ((16, 8), (8, 16)):
        case = make_case(torch.full((1, 1, 4), value), torch.full((1, 1, 32), key), empty(1, 1, 4))
        restored = dataclasses.replace(case, keys=data.view(1, 1, 4, 32), values=data.view(1, 1, 4, 32)).pack().unpack()
        assert float((restored[int(value == 16)] - data).abs().max()) <= bound


def test_what_exceeds_float16_is_named() -> None:
    case = make_case(torch.full((1, 1, 4), 4), torch.full((1, 1, 32), 4), empty(1, 1, 4))
    case.values[0, 0, 1, 2] = 1e6
    with pytest.raises(PluginError, match=r"values .* range of float16"):
        case.pack()


def test_ladder_of_calibrated_distortions() -> None:
    measured = {0: 1.0, 2: 0.5, 4: 0.25, 8: 0.125, 16: 0.0}
    ladder = MixedBit().ladder(64, 10, Distortion(value=measured, key=measured))
    assert ladder.value_distortion == ladder.key_distortion == tuple(measured.values())
    with pytest.raises(ConfigError, match="calibration lacks the width of 8 bits"):
        MixedBit().ladder(64, 10, Distortion(value=measured, key={0: 1.0, 2: 0.5, 4: 0.25, 16: 0.0}))


@pytest.mark.parametrize("name", ["smollm2", "paper"])
def test_ladder_falls_and_costs_rise(name: Any) -> None:
    ladder = MixedBit(MixedBitOptions(distortion=name)).ladder(32, 10)
    for distortion, cost in (
        (ladder.value_distortion, ladder.value_cost),
        (ladder.key_distortion, ladder.key_cost),
    ):
        assert distortion[0] == 1.0
        assert distortion[-1] == 0.0
        assert list(distortion) == sorted(set(distortion), reverse=True)
        assert list(cost) == sorted(set(cost))
    assert ladder.full_cost == 10 * 2 * 32 * 16
