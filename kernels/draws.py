"""The next token of every sequence from its logits, on the device: greedy, or sampled with noise of a counter.

A sampled token is ``argmax_t (logit_t / temperature + g_t)`` over the tokens that top-k, top-p and min-p leave, with
Gumbel noise ``g_t = -log(-log(u_t))``: a draw from the softmax. ``u_t`` is a hash of the sequence's seed, the position
and the token, so a sequence draws the same whatever else is in its batch, and a captured graph draws anew each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF  # of 32 bits, in int64


@dataclass(frozen=True)
class Draws:
    """How each sequence of a batch is sampled.

    Attributes:
        temperature: ``[B]`` float32, 0 for greedy.
        top_k: ``[B]`` int64, 0 for all tokens.
        top_p, min_p: ``[B]`` float32.
        seeds: ``[B]`` int64, at least 0.
        sampled: whether any sequence is.
        sorted: whether any needs its tokens in order, for top-k or top-p.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    sampled: bool
    sorted: bool

    @classmethod
    def of(
        cls,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        seeds: Sequence[int],
        device: torch.device,
    ) -> Draws:
        """From one value a sequence."""

        def floats(values: Sequence[float]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.float32, device=device)

        def whole(values: Sequence[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64, device=device)

        rows = list(zip(temperature, top_k, top_p, strict=True))
        return cls(
            floats(temperature),
            whole(top_k),
            floats(top_p),
            floats(min_p),
            whole(seeds),
            sampled=any(t > 0 for t, _, _ in rows),
            sorted=any(t > 0 and (k > 0 or p < 1) for t, k, p in rows),
        )


def choose(logits: Tensor, draws: Draws, positions: Tensor) -> Tensor:
    """The next token of each sequence; never waits for the device.

    Args:
        logits: ``[B, V]``.
        draws: of the ``B`` sequences.
        positions: ``[B]`` int64, of the tokens that are chosen.

    Returns:
        ``[B]`` int64.
    """
    logits = logits.float()
    likeliest = logits.argmax(-1)
    if not draws.sampled:
        return likeliest
    scaled = logits / draws.temperature.clamp(min=1e-6)[:, None]  # of greedy rows not used
    tokens = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
    if draws.sorted:
        scaled, tokens = scaled.sort(stable=True, dim=-1, descending=True)
        scaled = _truncated(scaled, draws)
    floor = scaled.amax(-1, keepdim=True) + draws.min_p.log()[:, None]  # minus infinity for a min-p of 0
    scaled = scaled.masked_fill(scaled < floor, float("-inf"))
    chosen = (scaled + gumbel(draws.seeds, positions, tokens)).argmax(-1, keepdim=True)
    return torch.where(draws.temperature > 0, tokens.gather(1, chosen).squeeze(1), likeliest)


def _truncated(scaled: Tensor, draws: Draws) -> Tensor:
    """Logits ``[B, V]`` in falling order, minus infinity beyond top-k and then top-p."""
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    most = torch.where(draws.top_k > 0, draws.top_k, scaled.shape[1])
    scaled = scaled.masked_fill(rank >= most[:, None], float("-inf"))
    share = scaled.softmax(-1)
    # The token that passes top-p is still in; the first always is, and all are where top-p is 1.
    beyond = (share.cumsum(-1) - share >= draws.top_p[:, None]) & (draws.top_p < 1)[:, None]
    return scaled.masked_fill(beyond & (rank > 0), float("-inf"))


def gumbel(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise of each token, ``[B, V]`` float32, from ``seeds`` and ``positions`` ``[B]``."""
    key = _mix(_mix(_mix(seeds & _MASK) ^ (seeds >> 32)) ^ positions)
    bits = _mix(_mix(tokens) ^ key[:, None])  # [B, V]
    # Fine steps where the largest noise comes from, and never 1.
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def _mix(x: Tensor) -> Tensor:
    """A hash of 32 bits to 32 bits, in int64: ``lowbias32`` of https://nullprogram.com/blog/2018/07/31/."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
