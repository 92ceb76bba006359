"""Moments of the window's attention, which never exists as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...kernels.naive_window import Moment
from ...runtime.observation import Observation

TokenWeight = Literal[
    "first-moment", "root-second-moment", "max", "first-moment-distance", "root-second-moment-distance"
]
MOMENTS: dict[TokenWeight, Moment] = {"first-moment": "sum", "root-second-moment": "square", "max": "max"}


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
    """Moments of the attention of the last ``window`` queries.

    Those with distances, and those of each query, are gathered from chunks (`Observation.attention_chunks`).
    """
    if not per_query and not weight.endswith("distance"):
        return Moments(_mean(observation.attention_moment(window, MOMENTS[weight]), observation, window, weight), None)
    tokens, queries = [], []
    for heads, attention in observation.attention_chunks(window):  # [B, h, G, W, T]
        squared = _squared_distance(attention, observation.values[:, heads].float())
        tokens.append(_token_moment(attention, squared, weight))
        if per_query:
            queries.append((attention.square() * squared).sum(-1))
    token = _mean(torch.cat(tokens, 1), observation, window, weight)
    return Moments(token, torch.cat(queries, 1) if queries else None)


def _token_moment(attention: Tensor, squared: Tensor, weight: TokenWeight) -> Tensor:
    """What a chunk of attention ``[B, h, G, W, T]`` adds to the weights, ``[B, h, T]``."""
    if weight == "max":
        return attention.amax((2, 3))
    first = weight.startswith("first")
    power = attention if first else attention.square()
    if weight.endswith("distance"):
        power = power * (squared.sqrt() if first else squared)
    return power.sum((2, 3))


def _mean(moment: Tensor, observation: Observation, window: int, weight: TokenWeight) -> Tensor:
    """The weight from its sum over queries: a mean over those that see the token, and its root for a second moment."""
    if weight == "max":
        return moment
    mean = moment.div_(observation.visible(window) * observation.groups)
    return mean if weight.startswith("first") else mean.sqrt_()


def _squared_distance(attention: Tensor, values: Tensor) -> Tensor:
    """``|v_t - o_w|^2`` for every query and token, ``[B, h, G, W, T]``, from ``values`` ``[B, h, T, D]``."""
    values = values.unsqueeze(2)  # [B, h, 1, T, D]
    output = torch.matmul(attention, values)  # [B, h, G, W, D]
    cross = torch.matmul(output, values.transpose(-1, -2))
    square = output.square().sum(-1, keepdim=True) - 2 * cross + values.square().sum(-1).unsqueeze(-2)
    return square.clamp(min=0.0)
