"""Compiling Triton kernels for a GPU that is not there, in a process without Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run(script: str, argument: Any) -> str:
    """What ``script`` prints, with ``argument`` as JSON in ``sys.argv[1]``; it may import `build` from here."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", script, json.dumps(argument)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kernel: Any, types: dict[str, str], warps: int = 4, stages: int | None = None, **constants: Any) -> Any:
    """``kernel`` compiled for an H100: arguments of ``types``, or else int32; pointers and strides multiples of 16."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or "stride" in name
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps} | ({} if stages is None else {"num_stages": stages})
    return compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options)
