"""transformers' `QuantizedCache`: every token at one width, by quanto or HQQ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from importlib.metadata import version
from math import gcd
from typing import Any, Literal

from torch import Tensor
from transformers.cache_utils import QuantizedCache

import rdkv

from ..method import Compressed, Prompt, full_nbytes
from .held import allocated
from .shape import Shape

PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
# HQQ's own recommendation is groups of consecutive numbers, its axis 1; quanto calls the same axis 0.
AXES = {"quanto": 0, "hqq": 1}
NEVER = 1 << 30  # tokens after the prompt stay at 16 bits, as with every method


class ForkableCache(QuantizedCache):
    """A `QuantizedCache` of which copies can be continued; quanto's tensors cannot be deep-copied."""

    def fork(self) -> ForkableCache:
        """A copy that shares the quantised prompt, which no later token changes."""
        fork = copy(self)
        fork.layers = [copy(layer) for layer in self.layers]
        return fork


@dataclass(frozen=True)
class Quantizer:
    """A backend of transformers at one width; a group of numbers shares a scale and a zero point."""

    backend: Literal["quanto", "hqq"]
    bits: int
    group: int = 64

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides what it does."""
        package = PACKAGES[self.backend]
        return {"backend": self.backend, "bits": self.bits, "group": self.group, "package": _named(package)}

    def cache(self, config: Any) -> ForkableCache:
        """An empty cache."""
        axis = AXES[self.backend]
        return ForkableCache(
            self.backend,
            config,
            nbits=self.bits,
            axis_key=axis,
            axis_value=axis,
            q_group_size=self.group,
            residual_length=NEVER,
        )

    @property
    def pair_share(self) -> float:
        """Bytes of a key and its value over those at 16 bits."""
        return (self.bits + 2 * 16 / self.group) / 16

    def multiple(self, shape: Shape) -> int:
        """Tokens come in multiples of this: whole groups, and as many of them as fill bytes."""
        whole = self.group * max(1, 8 // self.bits)
        return whole // gcd(whole, shape.batch * shape.heads * shape.dim)

    def fill(self, cache: QuantizedCache, layer: int, keys: Tensor, values: Tensor) -> None:
        """Quantise what can be packed of ``[B, H, T, D]``; the last tokens stay at 16 bits, as new ones would."""
        batch, heads, tokens, dim = keys.shape
        packed = tokens - tokens % self.multiple(Shape(1, batch, heads, tokens, dim))
        for part in (slice(packed), slice(packed, tokens)):
            if keys[:, :, part].numel():
                cache.update(keys[:, :, part], values[:, :, part], layer)


@dataclass(frozen=True)
class Quantized:
    """`QuantizedCache` as a method."""

    name: str
    quantizer: Quantizer

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method`."""
        return {"peer": _named("transformers"), **self.quantizer.settings}

    @contextmanager
    def compress(self, prompt: Prompt, budget: float) -> Iterator[Compressed]:
        """See `Method`; its bytes do not depend on the budget."""
        cache, full = self.quantizer.cache(prompt.recording.model_config), full_nbytes(prompt)
        if self.quantizer.pair_share > budget:  # before anything is packed: HQQ is slow
            raise rdkv.BudgetError(f"{self.name} takes {self.quantizer.pair_share:.2%}, the budget is {budget:.2%}")
        for seen in prompt.recording.observations:
            self.quantizer.fill(cache, seen.layer, seen.keys, seen.values)
        nbytes = allocated(cache)
        if nbytes > budget * full:
            raise rdkv.BudgetError(f"{self.name} takes {nbytes} bytes of {full}, the budget is {budget:.2%}")
        yield Compressed(cache, nbytes, full)


def _named(package: str) -> str:
    return f"{package} {version(package)}"
