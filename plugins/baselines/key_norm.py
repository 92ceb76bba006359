"""Key norm: keys of a small norm draw the attention."""

from __future__ import annotations

import torch

from ...runtime.interfaces import Scorer
from ...runtime.observation import Observation
from ...runtime.plan import Scores
from .channels import think_channels


class KeyNorm(Scorer):
    """Tokens whose keys have a small L2 norm are worth more (arXiv 2406.11430).

        s_t = mean_t' ||k_t'|| / ||k_t||

    The paper ranks by ``-||k_t||``; the reciprocal ranks alike, is positive, and does not change when all
    keys are scaled. It needs no queries.
    """

    def score(self, observation: Observation) -> Scores:
        norm = torch.linalg.vector_norm(observation.keys, dim=-1, dtype=torch.float32)  # [B, H, T]
        mean = norm.mean(-1, keepdim=True)
        # A zero key would be worth infinitely much; a head of nothing but zeros ranks its tokens alike.
        floor = torch.where(mean > 0, 1e-4 * mean, 1.0)
        token = torch.where(mean > 0, mean, 1.0) / norm.maximum(floor)
        return Scores(token=token, channel=think_channels(observation))
