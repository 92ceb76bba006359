"""The presses of kvpress that are measured: how each is told a budget, and what its result would take in memory.

A press is told a ratio; here it is the one that leaves at most the bytes it may hold. Three kinds of press:

* `Evicting`: keys and values of the same number of tokens leave every head, and their memory is free.
* `Masking`: heads differ in how many tokens they lose. kvpress keeps all keys and values, and masks what is evicted.
* `Channels`: key channels are pruned. kvpress keeps them, as zeros.

What the last two would need to hold, and what they do hold, are both counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import rdkv

from .shape import Shape

KEY_SHARE_PRUNED = 0.5  # of the key channels, beside eviction; ThinK's paper goes to 0.6


class Fitting(Protocol):
    """How a press is made for a budget."""

    def fit(self, shape: Shape, nbytes: int, pair_bytes: float, multiple: int = 1) -> Any:
        """A press whose result needs at most ``nbytes``.

        Args:
            pair_bytes: what a key with its value takes.
            multiple: of which the number of tokens is to be.

        Raises:
            rdkv.BudgetError: no such press.
        """


@dataclass(frozen=True)
class Evicting:
    """``make(ratio, **options)`` evicts as many tokens from every head."""

    make: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)

    def fit(self, shape: Shape, nbytes: int, pair_bytes: float, multiple: int = 1) -> Any:
        """See `Fitting`."""
        kept = _tokens(shape, nbytes, pair_bytes, multiple)
        return self.make(_ratio(kept, shape.tokens), **self.options)


@dataclass(frozen=True)
class Masking:
    """``make(ratio, **options)`` masks; ``across_layers`` if it counts pairs of the whole model and not of a layer."""

    make: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    across_layers: bool = False

    def fit(self, shape: Shape, nbytes: int, pair_bytes: float, multiple: int = 1) -> Any:
        """See `Fitting`."""
        room = nbytes if nbytes >= shape.pairs * pair_bytes else nbytes - shape.ragged_bytes
        if self.across_layers:
            total = shape.pairs // shape.batch
            kept = min(total, int(room // (shape.batch * pair_bytes)))
            if kept < 1:
                raise rdkv.BudgetError(f"no key of the prompt fits into {nbytes} bytes")
            # The press rounds what it prunes down, not what it keeps.
            ratio = 0.0 if kept == total else (total - kept + 0.5) / total
            return self.make(ratio, **self.options)
        return self.make(_ratio(_tokens(shape, room, pair_bytes), shape.tokens), **self.options)


@dataclass(frozen=True)
class Channels:
    """``prune(share)`` prunes key channels of what ``evict(ratio)`` left, of all tokens if that is None.

    Which channels are left is a bit each, in every head.
    """

    prune: Callable[[float], Any]
    compose: Callable[[list[Any]], Any]
    evict: Callable[..., Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def fit(self, shape: Shape, nbytes: int, pair_bytes: float, multiple: int = 1) -> Any:
        """See `Fitting`."""
        whole = nbytes >= shape.pairs * shape.pair_bytes
        room = nbytes - shape.channel_map_bytes
        if self.evict is None:
            left = shape.dim if whole else room // (2 * shape.pairs) - shape.dim
            if left < 0:
                raise rdkv.BudgetError("pruning key channels leaves half of the cache at least")
            pruned = max(0, shape.dim - left)
            return self.prune(min(1.0, (pruned + 0.5) / shape.dim) if pruned else 0.0)  # rounded down there
        pruned = 0 if whole else int(shape.dim * KEY_SHARE_PRUNED)
        kept = shape.tokens if whole else _tokens(shape, room, 2 * (2 * shape.dim - pruned))
        return self.compose([self.evict(_ratio(kept, shape.tokens), **self.options), self.prune(pruned / shape.dim)])


def find(name: str, options: dict[str, Any]) -> Fitting:
    """The press called ``name`` with kvpress's own ``options``.

    Raises:
        rdkv.ConfigError: no such press here.
        ImportError: kvpress is not installed.
    """
    import kvpress

    presses: dict[str, Callable[[], Fitting]] = {
        "snapkv": lambda: Evicting(kvpress.SnapKVPress, options),
        "expected-attention": lambda: Evicting(kvpress.ExpectedAttentionPress, options),
        "adakv-snapkv": lambda: Masking(lambda *a, **o: kvpress.AdaKVPress(kvpress.SnapKVPress(*a, **o)), options),
        "adakv-expected-attention": lambda: Masking(
            lambda *a, **o: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(*a, **o)), options
        ),
        "kvzip": lambda: Masking(kvpress.KVzipPress, options, across_layers=True),
        "think": lambda: Channels(kvpress.ThinKPress, kvpress.ComposedPress),
        "snapkv-think": lambda: Channels(kvpress.ThinKPress, kvpress.ComposedPress, kvpress.SnapKVPress, options),
    }
    if name not in presses:
        raise rdkv.ConfigError(f"there is no press {name!r} here; there are {', '.join(presses)}")
    return presses[name]()


def _tokens(shape: Shape, nbytes: int, pair_bytes: float, multiple: int = 1) -> int:
    """How many tokens of every head ``nbytes`` hold."""
    kept = min(shape.tokens, int(nbytes // (shape.all_heads * pair_bytes)))
    kept -= kept % multiple
    if kept < 1:
        raise rdkv.BudgetError(f"no token of the prompt fits into {nbytes} bytes")
    return kept


def _ratio(kept: int, tokens: int) -> float:
    """The ratio that makes a press keep ``kept`` tokens, which it finds as ``int(tokens * (1 - ratio))``."""
    return 0.0 if kept == tokens else 1 - (kept + 0.5) / tokens
