"""Time of the values' leverage in one layer: each kernel, all of them, and the twin in plain PyTorch.

    python -m bench.speed.leverage --tokens 4096 32768 131072 --heads 8 --dim 128 >> results.jsonl

Random values, bfloat16; the caches of the GPU are overwritten before each run. ``floor`` is the time that reading the
values as often as a run does takes at the copy bandwidth measured in the same process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rdkv.kernels import leverage, naive_leverage

from . import values


def cases(given: Tensor) -> dict[str, tuple[Callable[[], Any], float]]:
    """What is timed, and how often each reads the values."""
    sampled = min(1.0, naive_leverage.SAMPLE / given.shape[2])
    mean, precision = leverage.precision(given)
    return {
        "precision": (lambda: leverage.precision(given), sampled),
        "distances": (lambda: leverage.distances(given, mean, precision), 1.0),
        "leverage": (lambda: leverage.leverage(given), 1.0 + sampled),
        "leverage, plain PyTorch": (lambda: naive_leverage.leverage(given), 1.0 + sampled),
    }


if __name__ == "__main__":
    values.main("leverage", __doc__, cases)
