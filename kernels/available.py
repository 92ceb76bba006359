"""Whether our Triton kernels can run."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor


def triton_takes(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU and Triton is installed; their plain PyTorch twins take any."""
    return tensor.is_cuda and find_spec("triton") is not None
