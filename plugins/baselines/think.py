"""ThinK by itself: channels are ranked, tokens are not."""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch

from ...runtime.interfaces import PluginOptions, Scorer
from ...runtime.observation import Observation
from ...runtime.plan import Scores
from .channels import WINDOW, think_channels


class ThinkOptions(PluginOptions, frozen=True, kw_only=True):
    """Options of ``think``."""

    window: Annotated[int, msgspec.Meta(ge=1, description="last prompt tokens whose queries weigh the channels")] = (
        WINDOW
    )


class Think(Scorer):
    """Key channels by their part in the window's logits, all tokens alike (ThinK, arXiv 2407.21018).

    The paper prunes channels and leaves tokens to another method; `snapkv` has the same channel weights.
    For loose budgets, where no token has to go.
    """

    Options = ThinkOptions
    options: ThinkOptions

    def score(self, observation: Observation) -> Scores:
        keys = observation.keys
        token = torch.ones(keys.shape[:3], device=keys.device)  # [B, H, T]
        return Scores(token=token, channel=think_channels(observation, self.options.window))
