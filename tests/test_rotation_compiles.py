"""The rotation compiles for a real GPU, which the interpreter cannot tell; no GPU is needed for that."""

from __future__ import annotations

import pytest
from compiling import run

pytest.importorskip("triton")

SCRIPT = """
import json, sys
from compiling import build
from rdkv.kernels.naive_rotation import span
from rdkv.kernels.rotation_kernels import rotate_kernel

dtype, dim = json.loads(sys.argv[1])
types = dict(values=f"*{dtype}", out=f"*{dtype}")
build(rotate_kernel, types, 4, H=8, D=dim, SPAN=span(dim), FACTOR=0.125, BT=4096 // span(dim))
"""


@pytest.mark.parametrize("case", [("bf16", 128), ("fp16", 96), ("fp32", 64), ("bf16", 80)])
def test_compiles(case: tuple[str, int]) -> None:
    run(SCRIPT, case)
