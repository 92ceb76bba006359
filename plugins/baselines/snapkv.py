"""SnapKV: what the last queries attend to is what later ones will."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from ...runtime.interfaces import PluginOptions, Scorer
from ...runtime.observation import Observation
from ...runtime.plan import Scores
from .channels import think_channels


class SnapKVOptions(PluginOptions, frozen=True, kw_only=True):
    """Options of ``snapkv``."""

    window: Annotated[
        int, msgspec.Meta(ge=1, description="last prompt tokens, which vote on the rest and are kept themselves")
    ] = 32
    kernel_size: Annotated[int, msgspec.Meta(ge=1, description="width of the pooling in tokens, odd; 1 for none")] = 5
    pooling: Annotated[Literal["avg", "max"], msgspec.Meta(description="how neighbours' votes are pooled")] = "avg"

    def __post_init__(self) -> None:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"option kernel_size is {self.kernel_size}; it must be odd")


class SnapKV(Scorer):
    """Attention of the window over the prompt, pooled along the sequence (SnapKV, arXiv 2404.14469).

        s_t = pool_t( mean_{g,w} a_{g,w,t} )        for t before the window
        s_t = max_t' s_t' + mean_{g,w>=t} a_{g,w,t}  for t in the window, which ranks before all others

    ``a`` is the causal attention of query head ``g`` of the KV head's group and window position ``w``.
    """

    Options = SnapKVOptions
    options: SnapKVOptions

    def score(self, observation: Observation) -> Scores:
        window = self.options.window
        chunks = [weights.sum((2, 3)) for _, weights in observation.attention_chunks(window)]  # each [B, h, T]
        votes = torch.cat(chunks, dim=1) / (observation.groups * observation.visible(window))  # [B, H, T]
        cut = max(observation.tokens - window, 0)
        prefix, own = votes[..., :cut], votes[..., cut:]
        if cut:
            prefix = self._pool(prefix)
            own = own + prefix.amax(-1, keepdim=True)
        return Scores(token=torch.cat([prefix, own], dim=-1), channel=think_channels(observation, window))

    def _pool(self, votes: Tensor) -> Tensor:
        size = self.options.kernel_size
        if self.options.pooling == "max":
            return max_pool1d(votes, size, stride=1, padding=size // 2)
        # Zeros beyond the ends count, as in the published method.
        return avg_pool1d(votes, size, stride=1, padding=size // 2)
