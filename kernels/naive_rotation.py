"""The rotation that values are quantised under, so that no channel stands out, in plain PyTorch.

A Walsh-Hadamard transform,

    y = 2^-up H x,    x = 2^-down H y,    H[i, j] = (-1)^popcount(i & j)

over blocks of ``span`` channels, ``up + down = log2(span)``. What a token's quantiser has to cover is set by its
largest channel. A rotation leaves the energy as it is and makes every channel a sum of all of them, near a Gaussian,
which four levels cover far better. Attention is linear in the values, so that one rotation of its output undoes all.
QuIP# (arXiv 2402.04396) and QuaRot (arXiv 2404.00456) have it of weights, activations and caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SPAN = 16  # of fewer channels a sum is no Gaussian


def span(dim: int) -> int:
    """Channels that are rotated together: the largest power of two that divides ``dim``, 1 (nothing) below 16."""
    largest = dim & -dim
    return largest if largest >= LEAST_SPAN else 1


def exponents(span: int) -> tuple[int, int]:
    """``up`` and ``down``: powers of two, so that the factors cost no precision."""
    power = span.bit_length() - 1
    return (power + 1) // 2, power // 2


def rotate(values: Tensor, span: int) -> Tensor:
    """Values ``[..., D]`` as they are quantised, in their type."""
    return _turn(values, span, exponents(span)[0])


def restore(values: Tensor, span: int) -> Tensor:
    """The inverse of `rotate`."""
    return _turn(values, span, exponents(span)[1])


def _turn(values: Tensor, span: int, shift: int) -> Tensor:
    """Sums and differences of neighbours in float32, the sums first: as many times as ``span`` halves.

    Always in this order, so that no value's rotation depends on which others it is rotated with.
    """
    if span == 1:
        return values
    turned = values.float().reshape(*values.shape[:-1], values.shape[-1] // span, span)
    for _ in range(span.bit_length() - 1):
        even, odd = turned[..., ::2], turned[..., 1::2]
        turned = torch.cat([even + odd, even - odd], -1)
    scaled: Tensor = turned * 2.0**-shift
    return scaled.reshape(values.shape).to(values.dtype)
