"""Whether our Triton kernels can run, and what takes their place."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor


def kernels_for(name: str, tensor: Tensor) -> ModuleType:
    """`kernels.NAME` where it can run on ``tensor``, else its twin in plain PyTorch, `kernels.naive_NAME`."""
    return import_module(f".{name}" if triton_takes(tensor) else f".naive_{name}", __package__)


def triton_takes(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU and Triton is installed; their plain PyTorch twins take any."""
    return tensor.is_cuda and find_spec("triton") is not None
