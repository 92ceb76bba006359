"""StreamingLLM: the first tokens and the most recent ones."""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch

from ...runtime.interfaces import PluginOptions, Scorer
from ...runtime.observation import Observation
from ...runtime.plan import Scores
from .channels import think_channels


class StreamingOptions(PluginOptions, frozen=True, kw_only=True):
    """Options of ``streaming``."""

    sinks: Annotated[int, msgspec.Meta(ge=0, description="first tokens, which rank before all others")] = 4


class Streaming(Scorer):
    """Attention sinks, then the most recent tokens (StreamingLLM, arXiv 2309.17453).

        s_t = 2 - t / T      for t < sinks   (in (1, 2])
        s_t = (t + 1) / T    else            (in (0, 1])

    The content plays no part.
    """

    Options = StreamingOptions
    options: StreamingOptions

    def score(self, observation: Observation) -> Scores:
        batch, heads, tokens, _ = observation.keys.shape
        # float64: consecutive positions of a prompt of millions of tokens still differ after rounding to float32.
        position = torch.arange(tokens, device=observation.keys.device, dtype=torch.float64)
        sinks = observation.sinks(self.options.sinks)
        rank = torch.where(position < sinks, 2 - position / tokens, (position + 1) / tokens)
        token = rank.float().repeat(batch, heads, 1)  # [B, H, T]
        return Scores(token=token, channel=think_channels(observation))
