"""The kernels of leverage compile for a real GPU, which the interpreter cannot tell; no GPU is needed for that."""

from __future__ import annotations

import pytest
from compiling import run

pytest.importorskip("triton")

SCRIPT = """
import json, sys
from compiling import build
from rdkv.kernels.leverage_kernels import distance_kernel, moments_kernel, precision_kernel

dtype, dim = json.loads(sys.argv[1])
names = ("sums", "products", "mean", "out", "precision")
types = dict.fromkeys(names, "*fp32") | dict(values=f"*{dtype}", ridge="fp32", alike="fp32")
build(moments_kernel, types, 4, D=dim, BT=64, BD=32)
build(precision_kernel, types, 1, D=dim, BD=32)
build(distance_kernel, types, 4, D=dim, BT=64, BD=32)
"""


@pytest.mark.parametrize("case", [("bf16", 128), ("fp16", 96), ("fp32", 64), ("fp32", 128)])
def test_compiles(case: tuple[str, int]) -> None:
    run(SCRIPT, case)
