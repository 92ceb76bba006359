"""The meaning of `window` in plain PyTorch: what the last queries attend to, and how the keys spread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

# Bound on the float32 attention weights alive at once, in elements (256 MiB): one KV head of a
# 128K prompt with 32 window queries and a group of 4 takes a quarter of it.
CHUNK_ELEMENTS = 1 << 26

Moment = Literal["max", "sum", "square"]


def attention_chunks(queries: Tensor, keys: Tensor, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Causal attention of the last ``W`` tokens over the prompt, some KV heads at a time.

    Holds ``CHUNK_ELEMENTS`` weights at once, or those of one KV head if these are more, and as many
    keys in float32.

    Args:
        queries: ``[B, H, G, W, D]``.
        keys: ``[B, H, T, D]``, ``T >= W``.
        scale: factor of the logits.

    Yields:
        A slice of KV heads and their attention ``[B, h, G, W, T]`` float32.
    """
    batch, heads, groups, width, _ = queries.shape
    tokens = keys.shape[2]
    step = max(1, CHUNK_ELEMENTS // (batch * groups * width * tokens))
    later = torch.ones(width, width, dtype=torch.bool, device=keys.device).triu(1)
    for start in range(0, heads, step):
        part = slice(start, start + step)
        flat = queries[:, part].flatten(2, 3).float()  # [B, h, G * W, D]
        weights = torch.matmul(flat, keys[:, part].float().transpose(-1, -2)).mul_(scale)
        weights = weights.reshape(batch, -1, groups, width, tokens)
        weights[..., tokens - width :].masked_fill_(later, float("-inf"))  # only these are later than a query
        weights.sub_(weights.amax(-1, keepdim=True)).exp_()
        yield part, weights.div_(weights.sum(-1, keepdim=True))


def token_moments(queries: Tensor, keys: Tensor, scale: float, moment: Moment) -> Tensor:
    """``max a``, ``sum a`` or ``sum a^2`` of each token over the group and the window, ``[B, H, T]`` float32.

    Args and memory as `attention_chunks`.
    """
    parts = []
    for _, weights in attention_chunks(queries, keys, scale):
        if moment == "max":
            parts.append(weights.amax((2, 3)))
        else:
            parts.append((weights if moment == "sum" else weights.square_()).sum((2, 3)))
    return torch.cat(parts, 1)


def key_statistics(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over the tokens of ``keys`` ``[B, H, T, D]``, both ``[B, H, D]`` float32.

    Holds ``CHUNK_ELEMENTS`` keys in float32, or those of one KV head if these are more.
    """
    step = max(1, CHUNK_ELEMENTS // (keys[:, 0].numel() or 1))
    parts = [torch.var_mean(part.float(), 2, correction=0) for part in torch.split(keys, step, 1)]
    variance, mean = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    return mean, variance
