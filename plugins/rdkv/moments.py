"""Moments of the window's attention, gathered head by head so that it never exists as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...runtime.observation import Observation

TokenWeight = Literal[
    "first-moment", "root-second-moment", "max", "first-moment-distance", "root-second-moment-distance"
]


@dataclass(frozen=True)
class Moments:
    """What the scorer needs of the window's attention.

    Attributes:
        token: ``[B, H, T]`` float32, weight of each token before smoothing.
        query: ``[B, H, G, W]`` float32, ``sum_t a^2 |v_t - o|^2`` of each query, or None.
    """

    token: Tensor
    query: Tensor | None


def window_moments(observation: Observation, window: int, weight: TokenWeight, per_query: bool) -> Moments:
    """Moments of the attention of the last ``window`` queries."""
    seen = observation.visible(window) * observation.groups  # [T] queries that see a token
    tokens, queries = [], []
    for heads, attention in observation.attention_chunks(window):  # [B, h, G, W, T]
        squared = None
        if per_query or weight.endswith("distance"):
            squared = _squared_distance(attention, observation.values[:, heads].float())
        tokens.append(_token_weight(attention, squared, weight, seen))
        if per_query and squared is not None:
            queries.append((attention.square() * squared).sum(-1))
    return Moments(torch.cat(tokens, 1), torch.cat(queries, 1) if queries else None)


def _token_weight(attention: Tensor, squared: Tensor | None, weight: TokenWeight, seen: Tensor) -> Tensor:
    if weight == "max":
        return attention.amax((2, 3))
    first = weight.startswith("first")
    power = attention if first else attention.square()
    if weight.endswith("distance"):
        assert squared is not None
        power = power * (squared.sqrt() if first else squared)
    mean = power.sum((2, 3)) / seen
    return mean if first else mean.sqrt()


def _squared_distance(attention: Tensor, values: Tensor) -> Tensor:
    """``|v_t - o_w|^2`` for every query and token, ``[B, h, G, W, T]``, from ``values`` ``[B, h, T, D]``."""
    values = values.unsqueeze(2)  # [B, h, 1, T, D]
    output = torch.matmul(attention, values)  # [B, h, G, W, D]
    cross = torch.matmul(output, values.transpose(-1, -2))
    square = output.square().sum(-1, keepdim=True) - 2 * cross + values.square().sum(-1).unsqueeze(-2)
    return square.clamp(min=0.0)
