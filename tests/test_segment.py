"""Packed segments against a reference that packs nothing: one head, channel and token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from mixed import ALL_WIDTHS, ONE_HEAD_EMPTY, ONE_HEAD_RAW, ONE_TOKEN, ONLY_PINNED, Case, cases, empty, make_case, quick
from torch import Tensor

from rdkv.kernels import naive, naive_rotation
from rdkv.plugins.rdkv.format import MixedBit
from rdkv.runtime.plan import BitPlan

Row = tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.float32]]]


def half_below(x: float) -> np.float16:
    """The largest float16 that is at most ``x``."""
    half = np.float16(x)
    return np.nextafter(half, np.float16(-np.inf)) if np.float32(half) > np.float32(x) else half


def quantise(x: np.ndarray[Any, Any], bits: int, cuts: tuple[float, ...] = ()) -> np.ndarray[Any, Any]:
    """What is left of the numbers ``x`` at one scale, without ``cuts`` of their range at either end; checks that it is
    within half a step of each, and of what is nearest to those beyond."""
    low, high, extent = x.min(), x.max(), x.max() - x.min()
    for cut in cuts:
        low, high = low + extent * np.float32(cut), high - extent * np.float32(cut)
    zero = np.float32(half_below(low))
    scale = np.float32(-half_below(-(high - zero) / np.float32(2**bits - 1)))
    codes = np.round((x - zero) / scale) if scale > 0 else np.zeros_like(x)
    restored = codes.clip(0, 2**bits - 1) * scale + zero
    slack = 2e-6 * np.abs(x).max()
    assert (np.abs(restored.astype(np.float64) - x.clip(low, high)) <= np.float64(scale) / 2 + slack).all()
    return restored.astype(np.float32)


def quantised_value(value: Tensor, bits: int) -> np.ndarray[Any, Any]:
    """What is left of one token's value ``[D]``, which is rotated; of 2 bits an eighth and half of one are cut off."""
    span = naive_rotation.span(len(value))
    cuts = (1 / 8, 1 / 16) if bits == 2 and span > 1 else ()
    left = quantise(naive_rotation.rotate(value, span).float().numpy(), bits, cuts)
    return naive_rotation.restore(torch.from_numpy(left), span).numpy()


def reference(case: Case) -> list[list[Row]]:
    """``[b][h]`` of the kept tokens' keys and values: those apart, then by width 16, 8, 4, 2, then by position."""
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
            kept_values = [quantised_value(case.values[b, h, t], bits[t]) for t in coded]
            result[-1].append(
                (
                    np.concatenate([keys[pinned], kept_keys]),
                    np.concatenate([values[pinned], np.reshape(kept_values, (-1, dim))]),
                )
            )
    return result


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


def test_keys_of_a_short_head_do_not_see_the_padding_to_the_longest() -> None:
    value_bits = torch.tensor([[[2, 2, 2, 2], [0, 0, 0, 8]]])
    case = make_case(value_bits, torch.full((1, 2, 32), 2), empty(1, 2, 4))
    case.keys[0, 1, 3] = 5.0
    keys, _, held = case.pack().unpack()
    assert held[0, 1].tolist() == [True, False, False, False]
    assert torch.equal(keys[0, 1, 0], torch.full((32,), 5.0))
