"""The meaning of `leverage` in plain PyTorch: how unlike the others each value is.

    h_t = (v_t - m)^T C^-1 (v_t - m) / D

with the mean ``m`` and the covariance ``C`` of a head's values: the statistical leverage of a token, as its squared
Mahalanobis distance, which is 1 in the mean. A value that others resemble can be stood in for by them; in directions
in which the others hardly differ, none can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .naive_window import CHUNK_ELEMENTS

SAMPLE = 4096  # tokens that the covariance is of, at most; every so many-th of a longer prompt
RIDGE = 1e-4  # of the mean variance, added to every channel's: few tokens span few directions


def precision(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[B, H, D]`` and inverse covariance ``[B, H, D, D]`` of ``values`` ``[B, H, T, D]``, float32.

    What has no inverse gives no finite numbers.
    """
    sample = values[:, :, :: -(-values.shape[2] // SAMPLE)].float()
    mean = sample.mean(2, keepdim=True)
    sample = sample - mean
    covariance = torch.matmul(sample.transpose(2, 3), sample) / sample.shape[2]
    diagonal = covariance.diagonal(dim1=2, dim2=3)
    diagonal += RIDGE * diagonal.mean(-1, keepdim=True)
    inverse, singular = torch.linalg.inv_ex(covariance)
    return mean.squeeze(2), torch.where((singular == 0)[..., None, None], inverse, float("nan"))


def distances(values: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """``(v - m)^T P (v - m) / D`` of every value, ``[B, H, T]`` float32; 1 where that is no finite number.

    Args:
        values: ``[B, H, T, D]``.
        mean: ``[B, H, D]`` float32; precision: ``[B, H, D, D]`` float32, symmetric.
    """
    step = max(1, CHUNK_ELEMENTS // (values[:, 0].numel() or 1))
    parts = []
    for start in range(0, values.shape[1], step):
        some = slice(start, start + step)
        moved = values[:, some].float() - mean[:, some, None]
        parts.append((torch.matmul(moved, precision[:, some]) * moved).sum(-1) / values.shape[3])
    found = torch.cat(parts, 1)
    return torch.where(found.isfinite(), found.clamp(min=0.0), 1.0)


def leverage(values: Tensor) -> Tensor:
    """Leverage of each token's value, ``[B, H, T]`` float32.

    Args:
        values: ``[B, H, T, D]``. Where they are not finite, or all alike, every leverage is 1.
    """
    return distances(values, *precision(values))
