"""From the budget that a user gives to the bits that one head of one layer may take."""

from __future__ import annotations

from functools import lru_cache

from .config import CompressionConfig

ELEMENT_BITS = 16  # the full cache that budgets and retention are measured against
DECAY = 1.2  # a layer's loss falls by this power of its bytes (docs/quality.md)
SHARES = (0.25, 4.0)  # of an even budget, that a layer gets at least and at most
HEAD_POWER = 0.5  # of a head's loss, that what its tokens and channels weigh is proportional to
LEAST_WEIGHT = 0.01  # of a head, where the one of its layer that loses most has 1


@lru_cache(maxsize=16)  # every cache asks anew
def layer_shares(losses: tuple[float, ...]) -> tuple[float, ...]:
    """Bytes of each layer over those of an even budget, ``[L]``, whose mean is 1.

    They are what costs least in all, if a layer that costs ``s`` at an even budget (``losses``, to any scale) costs
    ``s b^-DECAY`` at ``b`` times that: ``b`` proportional to ``s^(1 / (1 + DECAY))``, within `SHARES`.
    """
    least, most = SHARES
    wanted = [loss ** (1 / (1 + DECAY)) for loss in losses]
    if not any(wanted):
        return (1.0,) * len(losses)
    low, high = 0.0, most / min(w for w in wanted if w)
    for _ in range(100):  # the factor for a mean of 1, by bisection: the mean rises with it
        factor = (low + high) / 2
        shares = [min(max(w * factor, least), most) for w in wanted]
        low, high = (low, factor) if sum(shares) > len(shares) else (factor, high)
    return tuple(share * len(shares) / sum(shares) for share in shares)


def head_weights(losses: tuple[float, ...]) -> tuple[float, ...]:
    """What the heads of one layer weigh in their competition for its bytes, ``[H]``, the largest 1.

    Scores are a share of each head's own attention and do not tell what the head is to the model's answers. A head
    weighs its loss when it alone is compressed (``losses``, to any scale) to the power of `HEAD_POWER`, at least
    `LEAST_WEIGHT` (docs/quality.md).
    """
    most = max(losses)
    if most <= 0:
        return (1.0,) * len(losses)
    return tuple(max((loss / most) ** HEAD_POWER, LEAST_WEIGHT) for loss in losses)


def layer_bits(
    config: CompressionConfig, tokens: int, head_dim: int, heads: int, shares: tuple[float, ...]
) -> tuple[int, ...]:
    """Bits of one head of each layer for a prompt of ``tokens`` tokens, ``[L]``.

    A layer has at most the bits of its full 16-bit cache; what its share is more, the others have.

    Args:
        heads: KV heads of a layer; with the layers they share ``budget_bytes``.
        shares: of the layers, see `layer_shares`.
    """
    token_bits = 2 * head_dim * ELEMENT_BITS  # key and value
    full = token_bits * tokens
    if config.budget_tokens is not None:
        each = token_bits * config.budget_tokens
    elif config.budget_bytes is not None:
        each = config.budget_bytes * 8 // (heads * len(shares))
    else:
        assert config.budget is not None
        each = int(config.budget * full)
    return _dealt(min(full, each), full, shares)


@lru_cache(maxsize=256)
def _dealt(each: int, full: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    """``each`` bits a layer on average, by ``shares`` and at most ``full``; whole numbers, so that no bit is lost."""
    weights = [round(share * 2**32) for share in shares]
    left, weight, bits = each * len(shares), sum(weights), [0] * len(shares)
    falling = sorted(range(len(shares)), key=lambda layer: -weights[layer])
    for layer in falling:  # the largest is capped first, and leaves more to the next
        bits[layer] = min(full, left * weights[layer] // weight)
        left, weight = left - bits[layer], weight - weights[layer]
    return tuple(bits)
