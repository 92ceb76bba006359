"""The kernels of a decode step compile for a real GPU, which the interpreter cannot tell; no GPU is needed for that."""

from __future__ import annotations

import pytest
from compiling import run

pytest.importorskip("triton")

SCRIPT = """
import json, sys
from compiling import build
from rdkv.kernels.step_kernels import add_norm_kernel, append_kernel, gated_kernel

model, tail, dim, rotary, norms = json.loads(sys.argv[1])
names = ("qkv", "cos", "sin", "query_weight", "key_weight", "query", "residual", "delta", "weight", "out", "gate_up")
types = dict.fromkeys(names, f"*{model}") | dict(keys=f"*{tail}", values=f"*{tail}", lengths="*i32", eps="fp32")
build(add_norm_kernel, types, N=4096, BN=4096, ADD=norms, PDL=norms)
build(append_kernel, types, 1, HQ=32, H=8, D=dim, DP=1 << (dim - 1).bit_length(), R=rotary, NORM=norms, PDL=norms)
build(gated_kernel, types, BN=1024, PDL=norms)
"""


@pytest.mark.parametrize(
    "case",
    [
        ("bf16", "bf16", 128, 128, True),
        ("fp16", "fp16", 96, 48, False),
        ("fp32", "fp16", 64, 64, True),  # what a float32 model keeps
        ("bf16", "fp32", 64, 0, False),
    ],
)
def test_compiles(case: tuple[str, str, int, int, bool]) -> None:
    run(SCRIPT, case)
