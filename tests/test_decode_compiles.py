"""The decode kernels compile for a real GPU, which the interpreter cannot tell; no GPU is needed for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rdkv.kernels.decode_kernels import attend_kernel, merge_kernel

POINTERS = dict(
    q_ptr="*bf16", key_codes="*i16", key_columns="*i16", key_affine="*i32", value_codes="*i16", value_affine="*i32",
    pinned_keys="*bf16", pinned_values="*bf16", counts="*i32", starts="*i64", tail_keys="*bf16", tail_values="*bf16",
    tail_lengths="*i32", items="*i32", outputs="*fp32", lses="*fp32", logit_scale="fp32", first_item="*i32",
    out="*bf16", out_lse="*fp32",
)


def build(kernel, warps, **constants):
    types = {name: POINTERS.get(name, "i32") for name in kernel.arg_names if name not in constants}
    types.update({name: "constexpr" for name in constants})
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or "stride" in name
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, num_stages=1))
    return built.metadata.shared


shape = json.loads(sys.argv[1])
dim, queries = shape["D"], shape["G"]
padded = 1 << (dim - 1).bit_length()
shared = build(
    attend_kernel, 4, H=8, G=queries, Q=1, N=8, D=dim, DP=padded, W=shape["W"], NA=shape["NA"],
    NB=shape["NB"], NS=32, MANY=shape["MANY"], AHEAD=shape["NB"] > 0, BT=64, PDL=True,
)
build(merge_kernel, 4, H=8, G=queries, Q=1, D=dim, DP=padded, BI=16, PDL=True)
print(shared)
"""


@pytest.mark.parametrize(
    "shape",
    [
        {"D": 128, "G": 4, "W": 64, "NA": 128, "NB": 64, "MANY": True},
        {"D": 96, "G": 8, "W": 32, "NA": 0, "NB": 0, "MANY": False},
        {"D": 256, "G": 16, "W": 32, "NA": 128, "NB": 16, "MANY": True},
    ],
)
def test_compiles(shape: dict[str, int]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(shape)], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 227 << 10  # bytes of shared memory that a program may have
