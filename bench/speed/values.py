"""The command line of the benchmarks of what a layer's values go through: `leverage`, `rotation`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import timing
from .window import measured

Cases = Callable[[Tensor], dict[str, tuple[Callable[[], Any], float]]]


def main(kind: str, description: str | None, cases: Cases) -> None:
    """Time ``cases`` of random values ``[B, H, T, D]``, and print a record of each.

    Args:
        kind: of the records.
        cases: what is timed, and how often it moves as many bytes as the values have.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32_768, 131_072])
    for name, value in (("batch", 1), ("heads", 8), ("dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    (speed, way), machine = timing.copy_bandwidth(), timing.machine()
    for tokens in arguments.tokens:
        size = (arguments.batch, tokens, arguments.heads, arguments.dim)
        values = torch.randn(size, device="cuda", dtype=torch.bfloat16).transpose(1, 2)  # as a model leaves them
        for name, (run, moves) in cases(values).items():
            record = {"kind": kind} | vars(arguments) | {"tokens": tokens, "what": name}
            record |= measured(run, moves * values.nbytes, speed) | {"copy_by": way}
            print(json.dumps(record | machine), flush=True)
