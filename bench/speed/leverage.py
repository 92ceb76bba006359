"""Time of the values' leverage in one layer: each kernel, all of them, and the twin in plain PyTorch.

    python -m bench.speed.leverage --tokens 4096 32768 131072 --heads 8 --dim 128 >> results.jsonl

Random values, bfloat16; the caches of the GPU are overwritten before each run. ``floor`` is the time that reading the
values as often as a run does takes at the copy bandwidth measured in the same process.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rdkv.kernels import leverage, naive_leverage

from . import timing
from .window import measured


def cases(values: Tensor) -> dict[str, tuple[Callable[[], Any], float]]:
    """What is timed, and how often each reads the values."""
    sampled = min(1.0, naive_leverage.SAMPLE / values.shape[2])
    mean, precision = leverage.precision(values)
    return {
        "precision": (lambda: leverage.precision(values), sampled),
        "distances": (lambda: leverage.distances(values, mean, precision), 1.0),
        "leverage": (lambda: leverage.leverage(values), 1.0 + sampled),
        "leverage, plain PyTorch": (lambda: naive_leverage.leverage(values), 1.0 + sampled),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32_768, 131_072])
    for name, value in (("batch", 1), ("heads", 8), ("dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    (speed, way), machine = timing.copy_bandwidth(), timing.machine()
    for tokens in arguments.tokens:
        size = (arguments.batch, tokens, arguments.heads, arguments.dim)
        values = torch.randn(size, device="cuda", dtype=torch.bfloat16).transpose(1, 2)  # as a model leaves them
        for name, (run, reads) in cases(values).items():
            record = {"kind": "leverage"} | vars(arguments) | {"tokens": tokens, "what": name}
            record |= measured(run, reads * values.nbytes, speed) | {"copy_by": way}
            print(json.dumps(record | machine), flush=True)


if __name__ == "__main__":
    main()
