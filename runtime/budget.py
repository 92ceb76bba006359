"""From the budget that a user gives to the bits that one head of one sequence may take."""

from __future__ import annotations

from .config import CompressionConfig

ELEMENT_BITS = 16  # the full cache that budgets and retention are measured against


def head_bits(config: CompressionConfig, tokens: int, head_dim: int, heads: int, layers: int) -> int:
    """Bits of one head for a prompt of ``tokens`` tokens, at most those of the full 16-bit cache.

    Args:
        heads: KV heads of a layer; with ``layers`` they share ``budget_bytes`` evenly.
    """
    token_bits = 2 * head_dim * ELEMENT_BITS  # key and value
    full = token_bits * tokens
    if config.budget_tokens is not None:
        return min(full, token_bits * config.budget_tokens)
    if config.budget_bytes is not None:
        return min(full, config.budget_bytes * 8 // (heads * layers))
    assert config.budget is not None
    return min(full, int(config.budget * full))
