"""The meaning of `items` in plain PyTorch: pinned tokens set apart, sorted tokens put in blocks, widths of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# Weights below this share of all are worth the same: next to nothing, but something, so that they fill what is left.
LEAST_WEIGHT = 2.0**-64
NOTHING = 1e-60  # what a block is worth at least, before that


def set_apart(token: Tensor, pinned: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``most`` pinned tokens of each head, weights that are -1 at them, and how many they are.

    Args:
        token: ``[P, h, T]`` float32.
        pinned: ``[P, h, T]`` bool.

    Returns:
        ``[P, h, T]`` float32, ``[P, h, T]`` bool, and ``[P, h]`` int64.
    """
    held = pinned & (pinned.cumsum(-1) <= most)
    return token.masked_fill(held, -1.0), held, held.sum(-1)


def block_weights(ranked: Tensor, block: int, pinned: bool) -> tuple[Tensor, Tensor]:
    """Shares of the weight, of blocks counted from the heaviest tokens, and their sums from the lightest.

    Args:
        ranked: ``[P, h, T]`` float32, ascending.
        pinned: whether some tokens are, those below 0: a block of them alone is worth nothing.

    Returns:
        ``[P, h, n]`` and ``[P, h, n + 1]`` float64.
    """
    if short := -ranked.shape[-1] % block:
        ranked = pad(ranked, (short, 0), value=-1.0)
    # Tokens that are all worth nothing are worth the same, so that they still fill the budget.
    weight = ranked.clamp(min=0.0).view(*ranked.shape[:2], -1, block).sum(-1, dtype=torch.float64) + NOTHING
    if pinned:
        weight = weight.masked_fill(ranked[..., block - 1 :: block] < 0, 0.0)
    weight = (weight / weight.sum((1, 2), keepdim=True)).clamp(min=LEAST_WEIGHT)
    # Summed from the lightest: a difference from the total would be lost to rounding.
    return weight, pad(weight.cumsum(-1), (1, 0))


def spread(boundary: Tensor, width: Tensor, order: Tensor, block: int, count: int) -> Tensor:
    """Width of each token, ``[P, h, T]`` uint8.

    Args:
        boundary: ``[P, h, S]`` int64, index of the lightest of ``count`` blocks that makes each step.
        width: ``[P, h, S + 1]`` float64, width after so many steps.
        order: ``[P, h, T]`` int64, tokens by rising weight.
    """
    place = torch.arange(count * block - order.shape[-1], count * block, device=boundary.device)
    steps = (place >= (boundary * block).unsqueeze(-1)).sum(2)  # [P, h, S, T] to [P, h, T]
    bits = width.to(torch.uint8).gather(-1, steps)
    return bits.scatter(-1, order, bits)
