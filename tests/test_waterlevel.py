"""Key widths at many water levels: the kernels against plain PyTorch, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from compiling import run
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import Levels, levels

from rdkv.kernels import naive_waterlevel

pytest.importorskip("triton")
from rdkv.kernels import waterlevel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
quick = settings(max_examples=200 if DEVICE == "cuda" else 12, deadline=None)

SCRIPT = """
from compiling import build
from rdkv.kernels import waterlevel_kernels as kernels

doubles = ("weight", "mass", "bar", "price", "gain", "limit", "whole", "loss", "water", "bits", "available", "factor")
TYPES = dict.fromkeys((*doubles, "around"), "*fp64") | {"point": "*i64", "chosen": "*i64"}
build(kernels.best_points_kernel, TYPES, S=4, SP=4, BL=8, BJ=16, STEPS=12)
build(kernels.best_points_kernel, TYPES, S=1, SP=1, BL=8, BJ=16, STEPS=12)
build(kernels.bracket_kernel, TYPES, LP=512, MP=2048, WANTED=2, BH=16)
"""


@quick
@given(case=levels(), wanted=st.sampled_from([0, 1, 2]), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_as_plain_pytorch(case: Levels, wanted: int, share: float, seed: int) -> None:
    """Losses are summed in another order; here no two points are as close as that."""
    steps, generator = case.points, torch.Generator().manual_seed(seed)
    columns = tuple(t.to(DEVICE) for t in (steps.bar, steps.price, steps.gain, steps.limit))
    whole = steps.whole.squeeze(-1) + torch.randint(1000, steps.whole.shape[:3], generator=generator)
    loss = torch.rand(whole.shape, dtype=torch.float64, generator=generator)
    given_ = [t.to(DEVICE) for t in (case.weight, case.mass)]
    rest = [t.to(DEVICE) for t in (whole, loss, case.water)]
    point, bits = waterlevel.best_points(*given_, columns, *rest)
    expected = naive_waterlevel.best_points(*given_, columns, *rest)
    assert point.equal(expected[0])
    assert bits.equal(expected[1])
    available = (expected[1].sum(1).amax(-1, keepdim=True) * share).floor()
    factor = torch.linspace(2, 0.5, 7, dtype=torch.float64, device=DEVICE).unsqueeze(0)
    for actual, meant in zip(
        waterlevel.bracket(point, bits, available, rest[2], factor, wanted),
        naive_waterlevel.bracket(point, bits, available, rest[2], factor, wanted),
        strict=True,
    ):
        assert actual.equal(meant)


def test_compiles() -> None:
    run(SCRIPT, None)
