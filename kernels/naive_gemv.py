"""Products of one vector with the small operations around them, in plain PyTorch; `gemv` has their kernel.

The vector is the hidden state of the only sequence of a batch. They round where transformers' modules do.
"""

from __future__ import annotations

from torch import Tensor, nn

from .naive_step import add_norm, gated


def norm_gemv(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``weight`` ``[N, K]`` times the RMS norm (``norm`` ``[K]``, ``eps``) of ``x`` ``[1, K]``: ``[1, N]``."""
    return nn.functional.linear(add_norm(x, None, norm, eps), weight, bias)


def gated_gemv(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``silu(gate) * up`` ``[1, N]``, which are the halves of `norm_gemv` with ``weight`` ``[2 N, K]``."""
    return gated(norm_gemv(x, norm, eps, weight, bias))


def add_gemv(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Add ``weight`` ``[N, K]`` times ``x`` ``[1, K]`` to ``residual`` ``[1, N]`` in place."""
    residual += nn.functional.linear(x, weight, bias)
