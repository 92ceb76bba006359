"""The meaning of `leverage` in plain PyTorch: how unlike the others each value is.

    h_t = sum_b (v_tb - m_b)^T C_b^-1 (v_tb - m_b) / D

with the mean ``m_b`` and the covariance ``C_b`` of a head's values in each block ``b`` of `BLOCK` channels: the
statistical leverage of a token by each block, as its squared Mahalanobis distance, which is 1 in the mean. A value that
others resemble can be stood in for by them; in directions in which the others hardly differ, none can. Blocks are
as good at finding such values as the covariance of all channels, and their inverses are small.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .naive_window import CHUNK_ELEMENTS

BLOCK = 32  # channels whose covariance is regarded; the last block of a head may have fewer
SAMPLE = 4096  # tokens that the covariance is of, at most; every so many-th of a longer prompt
RIDGE = 1e-4  # of a block's mean variance, added to every channel's: few tokens span few directions
ALIKE = 2.0**-20  # of the square of a block's mean: what is left of a difference of float32 squares is not a variance


def precision(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[B, H, D]`` and inverse covariances ``[B, H, N, BLOCK, BLOCK]`` of ``values`` ``[B, H, T, D]``, float32.

    What has no inverse gives no finite numbers. Channels that the last block lacks have nothing to do with the others.
    """
    batch, heads, _, dim = values.shape
    sample = values[:, :, :: -(-values.shape[2] // SAMPLE)].float()
    mean = sample.mean(2, keepdim=True)
    sample = _in_blocks(sample - mean)
    covariance = torch.bmm(sample.transpose(1, 2), sample) / sample.shape[1]
    diagonal = covariance.view(batch * heads, -1, BLOCK, BLOCK).diagonal(dim1=2, dim2=3)  # [B * H, N, BLOCK]
    spread = diagonal.mean(-1, keepdim=True)  # [B * H, N, 1]
    alike = spread <= ALIKE * _padded(mean).view(batch * heads, -1, BLOCK).square().mean(-1, keepdim=True)
    lift = (spread * RIDGE).masked_fill_(alike, float("nan"))
    if lacks := -dim % BLOCK:
        lift[:, -1] *= BLOCK / (BLOCK - lacks)
        diagonal[:, -1, -lacks:].fill_(1.0)
    diagonal += lift
    inverse = torch.linalg.inv_ex(covariance).inverse
    return mean.squeeze(2), inverse.view(batch, heads, -1, BLOCK, BLOCK)


def distances(values: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """``(v - m)^T P (v - m) / D`` of every value, ``[B, H, T]`` float32; a block that has no finite number counts as 1.

    Args:
        values: ``[B, H, T, D]``.
        mean: ``[B, H, D]`` float32; precision: ``[B, H, N, BLOCK, BLOCK]`` float32, symmetric.
    """
    heads = values.shape[1]
    step = max(1, CHUNK_ELEMENTS * heads // (values.numel() or 1))
    if step >= heads:
        return _distances(values, mean, precision)
    slices = [slice(start, start + step) for start in range(0, heads, step)]
    return torch.cat([_distances(values[:, some], mean[:, some], precision[:, some]) for some in slices], 1)


def _distances(values: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    moved = _in_blocks(values.float() - mean.unsqueeze(2))
    sizes = _sizes(values)
    found = (torch.bmm(moved, precision.flatten(0, 2)) * moved).sum(-1)  # [B * H * N, T]
    found = found.view(len(values), -1, len(sizes), values.shape[2])
    found = torch.where(found < float("inf"), found.clamp(min=0.0), sizes)
    return found.sum(2) / values.shape[3]


def leverage(values: Tensor) -> Tensor:
    """Leverage of each token's value, ``[B, H, T]`` float32.

    Args:
        values: ``[B, H, T, D]``. Where a block is not finite, or all alike, every value's leverage by it is 1.
    """
    return distances(values, *precision(values))


def _sizes(values: Tensor) -> Tensor:
    """How many channels each block has, ``[N, 1]`` float32; made where values are, since a copy waits for a GPU."""
    dim = values.shape[3]
    sizes = torch.full((-(-dim // BLOCK), 1), float(BLOCK), device=values.device)
    if lacks := -dim % BLOCK:
        sizes[-1].fill_(BLOCK - lacks)
    return sizes


def _padded(values: Tensor) -> Tensor:
    """With zeros for channels that the last block lacks."""
    lacks = -values.shape[-1] % BLOCK
    return functional.pad(values, (0, lacks)) if lacks else values


def _in_blocks(values: Tensor) -> Tensor:
    """``[B, H, T, D]`` as ``[B * H * N, T, BLOCK]``."""
    return _padded(values).reshape(*values.shape[:3], -1, BLOCK).transpose(2, 3).flatten(0, 2)
