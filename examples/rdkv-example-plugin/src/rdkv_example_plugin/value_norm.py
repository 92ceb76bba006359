"""Value norm: a token whose value is small adds little to any output, whoever attends to it."""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch

from rdkv import Observation, PluginOptions, Scorer, Scores


class ValueNormOptions(PluginOptions, frozen=True, kw_only=True):
    """Options of ``value-norm``."""

    exponent: Annotated[float, msgspec.Meta(gt=0, le=8, description="how much a larger norm is worth")] = 1.0
    recent: Annotated[int, msgspec.Meta(ge=0, description="last prompt tokens, worth as much as the largest")] = 8


class ValueNorm(Scorer):
    """Tokens by the L2 norm of their values, channels by the spread of their keys.

    s_t = (||v_t|| / max_t' ||v_t'||) ** exponent, and u_c = var_t k_{t,c}
    """

    Options = ValueNormOptions
    options: ValueNormOptions

    def score(self, observation: Observation) -> Scores:
        values = observation.values  # [B, H, T, D]
        norm = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)  # [B, H, T]
        largest = norm.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        token = (norm / largest) ** self.options.exponent
        token[..., max(observation.tokens - self.options.recent, 0) :] = 1.0
        channel = observation.keys.float().var(dim=2, correction=0)  # [B, H, D]
        return Scores(token=token, channel=channel)
