"""The small operations between the matrix products of a decode step, in plain PyTorch; `step` has their kernels.

They round where transformers' modules do, so that a step gives the same numbers as the model itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class HeadNorms(NamedTuple):
    """RMS norms of every query and key head: weights ``[D]`` each, and what keeps the root from 0."""

    query: Tensor
    key: Tensor
    eps: float


def add_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add ``delta`` to ``residual`` ``[N, C]`` in place, if there is one; the RMS norm of the sum, ``[N, C]``."""
    if delta is not None:
        residual += delta
    return _norm(residual, weight, eps)


def append(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    norms: HeadNorms | None,
    lengths: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Norm and rotate the newest tokens' queries and keys; write keys and values to the tails' last slots.

    Args:
        qkv: ``[B, (H_q + 2 H) * D]``, query heads, key heads, value heads.
        cos, sin: ``[B, R]`` of the tokens' positions; the first ``R`` channels of a head are rotated. None for no
            rotation.
        norms: of each head, before the rotation.
        lengths: ``[B]`` int32, tokens of each tail with the newest.
        keys, values: ``[B, H, capacity, D]``, the tails.

    Returns:
        Queries ``[B, H_q, 1, D]``.
    """
    batch, heads, _, dim = keys.shape
    parts = qkv.view(batch, -1, dim)
    query, key, value = torch.split(parts, [parts.shape[1] - 2 * heads, heads, heads], 1)
    if norms is not None:
        query, key = _norm(query, norms.query, norms.eps), _norm(key, norms.key, norms.eps)
    if cos is not None and sin is not None:
        query, key = (_rotated(x, cos[:, None], sin[:, None]) for x in (query, key))
    rows, last = torch.arange(batch, device=qkv.device), lengths.long() - 1
    keys[rows, :, last] = key.to(keys.dtype)
    values[rows, :, last] = value.to(values.dtype)
    return query.unsqueeze(2)


def gated(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` ``[N, I]`` of ``gate_up`` ``[N, 2 I]``."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, in float32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first channels of ``x`` ``[B, heads, D]``, half against half."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, rest], -1)
