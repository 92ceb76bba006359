"""Random scores: the floor under every method."""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch

from ...runtime.interfaces import PluginOptions, Scorer
from ...runtime.observation import Observation
from ...runtime.plan import Scores
from .channels import think_channels


class RandomOptions(PluginOptions, frozen=True, kw_only=True):
    """Options of ``random``."""

    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**31, description="seed of the draw")] = 0


class Random(Scorer):
    """Tokens drawn at random, uniform in [0, 1), for every head its own draw.

    The draw depends on the seed, the layer, the number of heads and the prompt's length; on the batch
    that a sequence is in, the device and torch's global generator it does not.
    """

    Options = RandomOptions
    options: RandomOptions

    def score(self, observation: Observation) -> Scores:
        keys = observation.keys
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + observation.layer)
        draw = torch.rand(observation.heads, observation.tokens, generator=generator)  # [H, T]
        token = draw.to(keys.device).repeat(keys.shape[0], 1, 1)  # [B, H, T]
        return Scores(token=token, channel=think_channels(observation))
