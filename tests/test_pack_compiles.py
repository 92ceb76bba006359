"""The packers compile for a real GPU, which the interpreter cannot tell; no GPU is needed for that."""

from __future__ import annotations

import pytest
from compiling import run

pytest.importorskip("triton")

SCRIPT = """
import json, sys
from compiling import build
from rdkv.kernels import pack_measure_kernels as measuring, pack_write_kernels as writing

INTEGERS = {"keys": "*i16", "values": "*i16", "pinned_keys": "*i16", "pinned_values": "*i16"}
FLOATS = {"keys": "*bf16", "values": "*bf16"}
POINTERS = dict(
    value_bits="*u8", key_bits="*u8", pinned="*u8", tally="*i32", report="*i32", counts="*i32", starts="*i64",
    token="*i32", place="*i32", peak="*fp32", low="*fp32", high="*fp32", total="*fp64", affine="*fp16",
    key_affine="*fp16", value_affine="*fp16", key_codes="*i16", key_columns="*i16", value_codes="*i32",
)


TYPES = POINTERS | FLOATS
dim = json.loads(sys.argv[1])
padded = 1 << (dim - 1).bit_length()
row, tile = {"D": dim, "DP": padded}, {"H": 8, "D": dim, "DP": padded}
rows = 4096 // padded
build(measuring.tally_kernel, TYPES, SPAN=1024)
build(measuring.slots_kernel, TYPES, **row, SPAN=1024, BS=128)
build(measuring.measure_kernel, TYPES, **tile, BT=min(128, rows), CHUNK=128)
build(measuring.tables_kernel, TYPES, 8, **row, BC=rows, CHUNK=128)
build(writing.keys_kernel, TYPES, **tile, W=max(2, 1024 // padded))
build(writing.values_kernel, TYPES, **tile, Q=max(1, 256 // padded))
build(writing.pinned_kernel, POINTERS | INTEGERS, **tile, BT=rows)
"""


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_compiles(dim: int) -> None:
    run(SCRIPT, dim)
