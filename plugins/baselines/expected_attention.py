"""Expected attention: what queries like those of the prompt would attend to, on average."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from ...runtime.interfaces import PluginOptions, Scorer
from ...runtime.observation import Observation
from ...runtime.plan import Scores
from .channels import think_channels


class ExpectedAttentionOptions(PluginOptions, frozen=True, kw_only=True):
    """Options of ``expected-attention``."""

    window: Annotated[
        int, msgspec.Meta(ge=1, description="last prompt tokens whose queries the mean and covariance are taken over")
    ] = 512
    sinks: Annotated[
        int, msgspec.Meta(ge=0, description="first tokens, left out of the statistics and ranked before all others")
    ] = 4
    covariance: Annotated[bool, msgspec.Meta(description="whether the spread of the queries counts")] = True
    value_norm: Annotated[bool, msgspec.Meta(description="whether a token is weighed by the norm of its value")] = True
    epsilon: Annotated[
        float, msgspec.Meta(ge=0, description="added to the attention before it is weighed by the value's norm")
    ] = 0.0


class ExpectedAttention(Scorer):
    """Attention expected from normally distributed queries (Expected Attention, arXiv 2510.00636).

    For ``q ~ N(mu, Sigma)`` and logits ``c q.k`` (``c`` the scale of the logits)

        log E[exp(c q.k_t)] = c mu.k_t + c^2 k_t' Sigma k_t / 2,
        s_t = (mean_g softmax_t(log E) + epsilon) * ||v_t||.

    The paper takes the queries before the rotary embedding and turns their statistics to future
    positions; here they are the rotated queries at the end of the prompt.
    """

    Options = ExpectedAttentionOptions
    options: ExpectedAttentionOptions

    def score(self, observation: Observation) -> Scores:
        token = torch.stack([self._head(*head, observation.scale) for head in self._heads(observation)], dim=1)
        if self.options.value_norm:
            norm = torch.linalg.vector_norm(observation.values, dim=-1, dtype=torch.float32)
            token = (token + self.options.epsilon) * norm  # [B, H, T]
        sinks = observation.sinks(self.options.sinks)
        token[..., :sinks] = token.amax(-1, keepdim=True)
        return Scores(token=token, channel=think_channels(observation))

    def _heads(self, observation: Observation) -> Iterator[tuple[Tensor, Tensor]]:
        """Queries ``[B, G, N, D]`` and keys ``[B, T, D]`` of one KV head after the other, float32."""
        # Queries that belong to sinks are outliers. A prompt of nothing but sinks keeps its last one.
        beyond = max(observation.tokens - observation.sinks(self.options.sinks), 1)
        queries = observation.window_queries(min(self.options.window, beyond))
        for head in range(observation.heads):
            yield queries[:, head].float(), observation.keys[:, head].float()

    def _head(self, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        """Expected attention of one KV head, mean over its group, ``[B, T]``."""
        mean = queries.mean(2)  # [B, G, D]
        logits = scale * torch.matmul(mean, keys.transpose(-1, -2))  # [B, G, T]
        if self.options.covariance:
            spread = queries - mean.unsqueeze(2)
            covariance = torch.matmul(spread.transpose(-1, -2), spread) / queries.shape[2]  # [B, G, D, D]
            for group in range(queries.shape[1]):  # one [B, T, D] at a time
                form = (torch.matmul(keys, covariance[:, group]) * keys).sum(-1)  # [B, T]
                logits[:, group] += 0.5 * scale**2 * form
        # exp of the expectation overflows float32; softmax subtracts the largest first.
        return logits.softmax(-1).mean(1)
