"""Positions of kept tokens: the kernels against plain PyTorch, bit for bit, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from compiling import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rdkv.kernels import naive_positions

pytest.importorskip("triton")
from rdkv.kernels import positions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SCRIPT = """
from compiling import build
from rdkv.kernels import positions_kernels as kernels

TYPES = dict.fromkeys(("bits", "pinned", "mask", "classes", "folded"), "*u8") | {"counts": "*i32", "places": "*i32"}
build(kernels.count_kernel, TYPES, SPAN=1024)
build(kernels.list_kernel, TYPES, SPAN=1024, BC=256)
build(kernels.fold_kernel, TYPES, BLOCK=1024)
"""


@settings(
    max_examples=200 if DEVICE == "cuda" else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(1, 4),
    tokens=st.sampled_from([1, 7, 8, 32, 33, 100]),
    widths=st.lists(st.sampled_from([0, 2, 4, 8, 16]), min_size=1, max_size=5),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_as_plain_pytorch(
    monkeypatch: pytest.MonkeyPatch, rows: int, tokens: int, widths: list[int], share: float, seed: int
) -> None:
    monkeypatch.setattr(positions, "SPAN", 32)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.tensor(widths, dtype=torch.uint8)[torch.randint(len(widths), (rows, tokens), generator=generator)]
    pinned = torch.rand(rows, tokens, generator=generator) < share
    totals = int((~pinned & (bits > 0)).sum()), int(pinned.sum())
    bits, pinned = bits.to(DEVICE), pinned.to(DEVICE)
    pairs = zip(positions.listed(bits, pinned, *totals), naive_positions.listed(bits, pinned, *totals), strict=True)
    for actual, meant in pairs:
        assert actual.equal(meant)
        assert actual.dtype == meant.dtype


def test_compiles() -> None:
    run(SCRIPT, None)
