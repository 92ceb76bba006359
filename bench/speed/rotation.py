"""Time of the rotation of one layer's values before they are packed, and of the twin in plain PyTorch.

    python -m bench.speed.rotation --tokens 4096 32768 131072 --heads 8 --dim 128 >> results.jsonl

Random values, bfloat16; the caches of the GPU are overwritten before each run. ``floor`` is the time that reading the
values and writing as many takes at the copy bandwidth measured in the same process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rdkv.kernels import naive_rotation, rotation

from . import values


def cases(given: Tensor) -> dict[str, tuple[Callable[[], Any], float]]:
    """What is timed, and how often each reads or writes as much as the values."""
    span = naive_rotation.span(given.shape[-1])
    return {
        "rotation": (lambda: rotation.rotate(given, span), 2.0),
        "rotation, plain PyTorch": (lambda: naive_rotation.rotate(given, span), 2.0),
    }


if __name__ == "__main__":
    values.main("rotation", __doc__, cases)
