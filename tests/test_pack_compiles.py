"""The packers compile for a real GPU, which the interpreter cannot tell; no GPU is needed for that."""

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
from rdkv.kernels import pack_measure_kernels as measuring, pack_write_kernels as writing

INTEGERS = {"keys": "*i16", "values": "*i16", "pinned_keys": "*i16", "pinned_values": "*i16"}
FLOATS = {"keys": "*bf16", "values": "*bf16"}
POINTERS = dict(
    value_bits="*u8", key_bits="*u8", pinned="*u8", tally="*i32", report="*i32", counts="*i32", starts="*i64",
    token="*i32", place="*i32", peak="*fp32", low="*fp32", high="*fp32", total="*fp64", affine="*fp16",
    key_affine="*fp16", value_affine="*fp16", key_codes="*i16", key_columns="*i16", value_codes="*i32",
)


def build(kernel, warps=4, data=FLOATS, **constants):
    types = {n: (POINTERS | data).get(n, "i32") for n in kernel.arg_names if n not in constants}
    types.update({name: "constexpr" for name in constants})
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or "stride" in name
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))


dim = json.loads(sys.argv[1])
padded = 1 << (dim - 1).bit_length()
row, tile = {"D": dim, "DP": padded}, {"H": 8, "D": dim, "DP": padded}
rows = 4096 // padded
build(measuring.tally_kernel, SPAN=1024)
build(measuring.slots_kernel, **row, SPAN=1024, BS=128)
build(measuring.measure_kernel, **tile, BT=min(128, rows), CHUNK=128)
build(measuring.tables_kernel, 8, **row, BC=rows, CHUNK=128)
build(writing.keys_kernel, **tile, W=max(2, 1024 // padded))
build(writing.values_kernel, **tile, Q=max(1, 256 // padded))
build(writing.pinned_kernel, data=INTEGERS, **tile, BT=rows)
"""


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_compiles(dim: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(dim)], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
