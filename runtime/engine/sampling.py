"""How a sequence is continued: sampling and stopping, as one msgspec Struct."""

from __future__ import annotations

import math

import msgspec

from ..errors import ConfigError


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How tokens are chosen, and when a sequence ends.

    Attributes:
        max_new_tokens: at most this many tokens are generated.
        temperature: 0 takes the likeliest token each time, above 0 samples.
        top_k: sample from this many of the likeliest tokens, 0 for all.
        top_p: sample from the likeliest tokens that hold this share of the probability (after ``top_k``).
        min_p: sample from tokens that have at least this share of the likeliest one's probability.
        seed: of the sequence's random numbers; None draws one. The same seed and prompt give the same tokens,
            whatever else is in the batch.
        stop: texts that end a sequence; they are not part of its text.
        stop_token_ids: tokens that end a sequence, besides the model's end tokens.
        ignore_eos: go on after the model's end tokens.

    Raises:
        ConfigError: a value out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0 (all tokens) or a number of tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p}; it must be from 0 to 1")
        for name, idle in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
            if self.temperature == 0 and getattr(self, name) != idle:
                raise ConfigError(f"{name} has no effect without sampling; set a temperature above 0")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be a whole number from 0 to 2**63 - 1")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ConfigError(f"stop is {self.stop!r}; it must be a list of texts, none of them empty")
