"""The reference scorer: how much the window's attention output changes if a token or channel is lost."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from ...runtime.interfaces import PluginOptions, Scorer
from ...runtime.observation import Observation
from ...runtime.plan import Scores
from .moments import Moments, TokenWeight, window_moments


class AttentionDistortionOptions(PluginOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of ``attention-distortion``."""

    window: Annotated[int, msgspec.Meta(ge=1, description="last prompt tokens whose queries observe the prompt")] = 32
    smoothing: Annotated[
        int, msgspec.Meta(ge=1, description="width of the smoothing along the prompt, in tokens; 1 for none")
    ] = 129
    kernel: Annotated[
        Literal["mean", "max", "gaussian", "pyramid"], msgspec.Meta(description="shape of the smoothing")
    ] = "pyramid"
    ahead: Annotated[
        float, msgspec.Meta(ge=0.0, le=1.0, description="share of the width that lies after the token attended to")
    ] = 0.75
    token_weight: Annotated[TokenWeight, msgspec.Meta(description="how attention of the window becomes a weight")] = (
        "max"
    )
    leverage: Annotated[
        float, msgspec.Meta(ge=0.0, description="mean weights that a token has at least, times its excess leverage")
    ] = 0.2
    channel_weight: Annotated[
        Literal["variance", "think", "attention"], msgspec.Meta(description="how a key channel is weighed")
    ] = "variance"
    sinks: Annotated[
        int, msgspec.Meta(ge=0, description="first tokens that stay at 16 bits, outside the quantiser")
    ] = 4


class AttentionDistortion(Scorer):
    """First-order distortion of the window's attention outputs (arXiv 2605.08317).

    With ``a`` the window's attention, ``o`` its outputs and ``v_t`` the values, over the ``W`` queries and
    the query heads of a KV head a token weighs (``token_weight``)

    * ``first-moment``: ``mean a`` (the paper's default); ``root-second-moment``: ``sqrt(mean a^2)``;
      ``max``: ``max a``;
    * the same times the distance that eviction moves the output:
      ``first-moment-distance``: ``mean a |o - v_t|``, ``root-second-moment-distance``: ``sqrt(mean a^2 |o - v_t|^2)``,

    means being over the queries that see the token, then smoothed along the prompt. What queries yet to come will ask
    for, the window may not have attended to: they miss what no other token has, so a token weighs at least ``leverage``
    mean weights of its head, times what the leverage of ``v_t`` among the head's values exceeds the mean by, which is
    1. A channel weighs (``channel_weight``)

    * ``variance``: ``var_t k_c * mean_w q_c^2``, the error of its logits when its mean is kept;
    * ``think``: ``mean_t k_c^2 * mean_w q_c^2`` (ThinK, arXiv 2407.21018; the paper's default);
    * ``attention``: ``var_t k_c * mean_w q_c^2 sum_t a^2 |v_t - o|^2``, the error of the outputs.
    """

    Options = AttentionDistortionOptions
    options: AttentionDistortionOptions

    def score(self, observation: Observation) -> Scores:
        options = self.options
        sinks = observation.sinks(options.sinks)
        moments = window_moments(
            observation, options.window, options.token_weight, per_query=options.channel_weight == "attention"
        )
        token = moments.token
        token[..., :sinks] = 0.0  # they are kept anyway, and must not lift their neighbours
        pinned = None
        if sinks:
            pinned = torch.zeros_like(token, dtype=torch.bool)
            pinned[..., :sinks] = True
        token = smooth(token, options.smoothing, options.kernel, options.ahead)
        if options.leverage:
            least = token.mean(2, keepdim=True) * options.leverage
            token = torch.maximum(token, observation.value_leverage().sub_(1.0).mul_(least))
        return Scores(
            token=token,
            channel=self._channel(observation, moments, sinks),
            pinned=pinned,
        )

    def _channel(self, observation: Observation, moments: Moments, sinks: int) -> Tensor:
        power = observation.window_queries(self.options.window).float().square()  # [B, H, G, W, D]
        if moments.query is not None:
            power = power * moments.query.unsqueeze(-1)
        mean, spread = observation.key_statistics(sinks if sinks < observation.tokens else 0)
        if self.options.channel_weight == "think":
            spread = spread + mean.square()
        return power.mean((2, 3)) * spread


def smooth(token: Tensor, width: int, kernel: str, ahead: float = 0.5) -> Tensor:
    """Smooth ``[B, H, T]`` along the prompt, its ends reflected.

    Args:
        width: of the kernel, in tokens; an even width is rounded up to odd.
        kernel: ``mean``, ``max`` or ``gaussian`` (two standard deviations at each end), or ``pyramid``: the mean of
            means over the width, a quarter and a sixteenth of it, peaked and with long tails.
        ahead: share of the kernel that lies after the token whose weight it spreads: an answer that copies what is
            attended to reads on from there. A Gaussian is centred.
    """
    tokens = token.shape[-1]
    if kernel == "gaussian":
        half = min(width // 2, tokens - 1)
        return _bell(token, half) if half else token
    widths = (width, max(width // 4, 1), max(width // 16, 1)) if kernel == "pyramid" else (width,)
    spans = [_span(each, ahead, tokens) for each in widths]
    most_after, most_before = spans[0]
    padded = functional.pad(token, (most_after, most_before), mode="reflect")
    pool = functional.max_pool1d if kernel == "max" else functional.avg_pool1d
    parts = [pool(padded, most_after + most_before + 1, stride=1)]
    for after, before in spans[1:]:
        part = padded[..., most_after - after : most_after + tokens + before]
        parts.append(pool(part, after + before + 1, stride=1))
    return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)


def _span(width: int, ahead: float, tokens: int) -> tuple[int, int]:
    """How far a token's weight is spread to later tokens and to earlier ones."""
    both = 2 * min(width // 2, tokens - 1)
    after = min(round(both * ahead), tokens - 1)
    return after, min(both - after, tokens - 1)


def _bell(token: Tensor, half: int) -> Tensor:
    padded = functional.pad(token, (half, half), mode="reflect")
    offset = torch.arange(-half, half + 1, device=token.device, dtype=token.dtype)
    bell = torch.exp(-0.5 * (offset * 4 / (2 * half + 1)).square())
    return functional.conv1d(padded.flatten(0, 1).unsqueeze(1), (bell / bell.sum())[None, None]).reshape(token.shape)
