"""Channel weight of the baselines, which are methods for tokens and say nothing of channels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.observation import Observation

WINDOW = 32  # queries that weigh the channels where a scorer has no window of its own


def think_channels(observation: Observation, window: int = WINDOW) -> Tensor:
    """Weight of every key channel, ``[B, H, D]`` float32 (ThinK, arXiv 2407.21018).

        u_c = mean_w q_{w,c}^2 * mean_t k_{t,c}^2

    Up to a factor, the squared Frobenius norm of the channel's contribution to the window's logits; the
    paper ranks by the norm itself. The mean over queries runs over the group of the KV head too.
    """
    queries = observation.window_queries(window).float()  # [B, H, G, W, D]
    # A norm with a dtype sums in float32 and spares a float32 copy of all keys.
    keys: Tensor = torch.linalg.vector_norm(observation.keys, dim=2, dtype=torch.float32)  # [B, H, D]
    weight: Tensor = queries.square().mean((2, 3)) * (keys.square() / observation.tokens)
    return weight
