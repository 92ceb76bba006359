"""Filling a budget: the kernels against plain PyTorch, bit for bit, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from compiling import run
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import Levels, levels

from rdkv.kernels import naive_filling

pytest.importorskip("triton")
from rdkv.kernels import filling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
quick = settings(max_examples=200 if DEVICE == "cuda" else 12, deadline=None)

SCRIPT = """
from compiling import build
from rdkv.kernels import filling_kernels as kernels

doubles = ("weight", "bar", "price", "limit", "water", "saved", "need", "toll", "rate", "cost")
TYPES = dict.fromkeys(doubles, "*fp64") | {"boundary": "*i64", "out": "*i64", "rank": "*i32"}
for limited in (False, True):
    build(kernels.saved_kernel, TYPES, S=4, BR=32, BL=16, STEPS=12, LIMITED=limited)
    build(kernels.settled_kernel, TYPES, S=4, BR=32, LP=2048, STEPS=12, LIMITED=limited)
build(kernels.rank_kernel, TYPES, S=4, BI=64)
build(kernels.spend_kernel, TYPES, S=4, BR=32, NP=512)
build(kernels.spend_kernel, TYPES, 16, S=4, BR=32, NP=16384)
"""


@quick
@given(case=levels(), limited=st.booleans(), share=st.floats(-0.1, 1.1))
def test_as_plain_pytorch(case: Levels, limited: bool, share: float) -> None:
    steps = case.steps
    bar, price, limit, toll, rate = (
        t.to(DEVICE) for t in (steps.bar, steps.price, steps.limit, steps.toll, steps.rate)
    )
    weight, water, need = (t.to(DEVICE) for t in (case.weight, case.water, (steps.whole.sum(1) * share).floor()))
    columns, unit = (bar, price, limit if limited else None), torch.linspace(0, 1, 9, dtype=torch.float64).to(DEVICE)
    water = filling.narrowed(weight, *columns, water, need, unit)
    assert water.equal(naive_filling.narrowed(weight, *columns, case.water.to(DEVICE), need, unit))
    boundary = filling.settled(weight, *columns, water, need)
    assert boundary.equal(naive_filling.settled(weight, *columns, water, need))
    spent = filling.spend(weight, price, toll, rate, boundary, need)
    assert spent.equal(naive_filling.spend(weight, price, toll, rate, boundary, need))


def test_more_steps_than_one_program_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "MOST", 16)
    weight = torch.rand(1, 2, 20, dtype=torch.float64, device=DEVICE).sort(-1).values
    one, need = torch.ones(1, 2, 1, dtype=torch.float64, device=DEVICE), torch.full((1, 1), 37.0, device=DEVICE)
    boundary = torch.full((1, 2, 1), 20, device=DEVICE)
    assert int(filling.spend(weight, one, one, one, boundary, need).sum()) == 37


def test_compiles() -> None:
    run(SCRIPT, None)
