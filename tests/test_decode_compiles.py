"""The decode kernels compile for a real GPU, which the interpreter cannot tell; no GPU is needed for that."""

from __future__ import annotations

import pytest
from compiling import run

pytest.importorskip("triton")

SCRIPT = """
import json, sys
from compiling import build
from rdkv.kernels.decode_kernels import attend_kernel, merge_kernel
from rdkv.kernels.decode_schedule_kernels import count_kernel, cut_kernel
from rdkv.kernels.naive_rotation import span

POINTERS = dict(
    q_ptr="*bf16", key_codes="*i16", key_columns="*i16", key_affine="*i32", value_codes="*i16", value_affine="*i32",
    pinned_keys="*bf16", pinned_values="*bf16", counts="*i32", starts="*i64", tail_keys="*bf16", tail_values="*bf16",
    tail_lengths="*i32", places="*i64", pages="*i32", page_starts="*i64", items="*i32", outputs="*fp32", lses="*fp32",
    logit_scale="fp32", first_item="*i32", out="*bf16", out_lse="*fp32",
)


shape = json.loads(sys.argv[1])
dim, queries = shape["D"], shape["G"]
padded = 1 << (dim - 1).bit_length()
shared = build(
    attend_kernel, POINTERS, stages=1, H=8, G=queries, Q=1, N=8, D=dim, DP=padded, W=shape["W"], NA=shape["NA"],
    NB=shape["NB"], NS=32, MANY=shape["MANY"], AHEAD=shape["NB"] > 0, BT=64, PAGED=shape["PAGED"], PDL=True,
)
for rotated in (1, span(dim)):
    build(
        merge_kernel, POINTERS, stages=1, H=8, G=queries, Q=1, D=dim, DP=padded, BI=16, PDL=True,
        SPAN=rotated, FACTOR=0.5,
    )
tables = dict(
    counts="*i32", prompt_tokens="*i32", places="*i64", lengths="*i64", parts="*i32", first_item="*i32",
    tail_lengths="*i32", page_starts="*i64", items="*i32",
)
build(count_kernel, tables, H=8, D=dim, TILE=512, BR=2048)
build(cut_kernel, tables, warps=1, H=8, TILE=512, BI=64)
print(shared.metadata.shared)
"""


@pytest.mark.parametrize(
    "shape",
    [
        {"D": 128, "G": 4, "W": 64, "NA": 128, "NB": 64, "MANY": True, "PAGED": True},
        {"D": 96, "G": 8, "W": 32, "NA": 0, "NB": 0, "MANY": False, "PAGED": False},
        {"D": 256, "G": 16, "W": 32, "NA": 128, "NB": 16, "MANY": True, "PAGED": True},
    ],
)
def test_compiles(shape: dict[str, int]) -> None:
    shared = int(run(SCRIPT, shape))
    assert shared <= 227 << 10  # bytes of shared memory that a program may have


def test_kernels_call_nothing_that_others_replace() -> None:
    """SGLang sets ``triton.next_power_of_2`` to a function of its own; a kernel that names it no longer compiles."""
    script = """
import pkgutil, importlib, triton
triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
import rdkv.kernels
from triton.runtime.jit import JITFunction
seen = 0
for module in pkgutil.iter_modules(rdkv.kernels.__path__, "rdkv.kernels."):
    if module.name.endswith("_kernels"):
        for name, kernel in vars(importlib.import_module(module.name)).items():
            if isinstance(kernel, JITFunction):
                kernel.cache_key  # finds what the kernel refers to
                seen += 1
print(seen)
"""
    assert int(run(script, None)) > 30
