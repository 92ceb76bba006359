"""Requests for log-likelihoods, ordered so that a context is read once for all its continuations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Context:
    """A context's tokens, and the continuations that are asked of it: the request's index and its tokens."""

    tokens: tuple[int, ...]
    continuations: list[tuple[int, list[int]]] = field(default_factory=list)


def contexts(pairs: Sequence[tuple[list[int], list[int]]], longest: int) -> list[Context]:
    """Different contexts of ``(context, continuation)`` pairs, the longest first.

    Args:
        longest: tokens that the model takes at once. What is too long loses the beginning of its context, as
            lm-evaluation-harness does it; the last token of a continuation is only predicted.
    """
    found: dict[tuple[int, ...], Context] = {}
    for index, (context, continuation) in enumerate(pairs):
        room = longest + 1 - len(continuation)
        if not context or not continuation or room < 1:
            raise ValueError(f"a request of {len(context)} + {len(continuation)} tokens; the model takes {longest}")
        kept = tuple(context[-room:])
        found.setdefault(kept, Context(kept)).continuations.append((index, continuation))
    return sorted(found.values(), key=lambda context: -len(context.tokens))


def batches(ordered: Sequence[Context], size: int) -> Iterator[Sequence[Context]]:
    """``size`` contexts at a time."""
    for begin in range(0, len(ordered), size):
        yield ordered[begin : begin + size]
