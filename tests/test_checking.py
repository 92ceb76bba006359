"""What checks ask the device: the kernels against plain PyTorch, bit for bit, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from compiling import run
from hypothesis import given, settings
from hypothesis import strategies as st

from rdkv.kernels import naive_checking
from rdkv.plugins.rdkv.format import MixedBit

pytest.importorskip("triton")
from rdkv.kernels import checking

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
quick = settings(max_examples=200 if DEVICE == "cuda" else 25, deadline=None)

SCRIPT = """
from compiling import build
from rdkv.kernels import checking_kernels as kernels

floats = dict.fromkeys(("token", "channel", "parts", "sound_token", "sound_channel"), "*fp32") | {"figures": "*fp64"}
build(kernels.score_rows_kernel, floats, 8, BLOCK=4096, SMALL=256)
build(kernels.score_figures_kernel, floats, BLOCK=256)
build(kernels.sound_scores_kernel, floats, BLOCK=2048)
plan = ("value_bits", "key_bits", "pinned", "sound_value", "sound_key", "sound_pinned", "widths")
numbers = ("values", "layer_bits", "channel_bits", "value_odd", "key_odd", "out", "parts")
TYPES = dict.fromkeys(plan, "*u8") | dict.fromkeys(numbers, "*i64") | {"figures": "*fp64"}
build(kernels.plan_rows_kernel, TYPES, 16, CP=8, DP=128, BT=2048)
for each_head in (False, True):
    build(kernels.plan_figures_kernel, TYPES, RP=8, EACH_HEAD=each_head)
build(kernels.sound_plan_kernel, TYPES, BLOCK=2048)
"""


@quick
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 30, 50])),
    bad=st.sampled_from([0.0, -0.5, math.nan, math.inf, -math.inf]),
    where=st.integers(0, 10_000),
    of_channels=st.booleans(),
)
def test_scores(shape: tuple[int, int, int], bad: float, where: int, of_channels: bool) -> None:
    token, channel = torch.rand(shape, device=DEVICE) + 1, torch.rand(*shape[:2], 20, device=DEVICE) + 1
    spoilt = (channel if of_channels else token).flatten()
    spoilt[where % len(spoilt)] = bad
    figures = checking.score_figures(token, channel)
    expected = naive_checking.score_figures(token, channel)
    assert figures.dtype == torch.float64
    torch.testing.assert_close(figures, expected, rtol=0, atol=0, equal_nan=True)
    pairs = zip(
        checking.sound_scores(token, channel, figures),
        naive_checking.sound_scores(token, channel, expected),
        strict=True,
    )
    assert all(actual.equal(meant) for actual, meant in pairs)


@quick
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 30, 50])),
    layers=st.integers(1, 3),
    widths=st.lists(st.sampled_from([0, 2, 4, 8, 16]), min_size=1, max_size=5),
    odd=st.sampled_from([None, 3, 255]),
    pins=st.sampled_from([0.0, 0.3, 1.0]),
    blocks=st.booleans(),
    each_head=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_plans(
    shape: tuple[int, int, int],
    layers: int,
    widths: list[int],
    odd: int | None,
    pins: float,
    blocks: bool,
    each_head: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, heads, tokens = shape[0], shape[1] * layers, shape[2]
    ladder = MixedBit().ladder(20, tokens)
    if not blocks:
        ladder = dataclasses.replace(ladder.restrict((0, 2, 16)), token_block=1, key_block=1)

    def some(count: int) -> torch.Tensor:
        """One width in some heads, any in others; seldom one that the format lacks."""
        every = torch.tensor(widths, dtype=torch.uint8)[
            torch.randint(len(widths), (batch, heads, count), generator=generator)
        ]
        alike = torch.rand(batch, heads, 1, generator=generator) < 0.5
        every = every.where(alike, every.amax(-1, keepdim=True))
        if odd is not None:
            every[-1, -1, -1] = odd
        return every.to(DEVICE)

    pinned = (torch.rand(batch, heads, tokens, generator=generator) < pins).to(DEVICE)
    plan = (some(tokens), some(20), pinned)
    prices = ladder.prices(pinned.device)
    figures = checking.plan_figures(*plan, prices, each_head, layers)
    assert figures.equal(naive_checking.plan_figures(*plan, prices, each_head, layers))
    pairs = zip(checking.sound_plan(*plan, figures), naive_checking.sound_plan(*plan, figures), strict=True)
    assert all(actual.equal(meant) and actual.dtype == meant.dtype for actual, meant in pairs)


def test_compiles() -> None:
    run(SCRIPT, None)
