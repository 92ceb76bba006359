"""One sequence's answer as it grows: its text, token by token, and when it ends."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .sampling import Sampling

Finish = Literal["stop", "length"]
_BROKEN = "\ufffd"  # what a tokenizer makes of a character whose bytes are not all there


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """An answer.

    Attributes:
        text: without special tokens and without what ended it; empty if the engine has no tokenizer.
        tokens: ids, the one that ended it included.
        finish: ``stop`` (an end token, a stop token or a stop text) or ``length``.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """What one decode step added to one sequence.

    Attributes:
        index: of the prompt.
        token: id.
        text: what can be shown now; text that may be the beginning of a stop text, or of a character, comes later.
        finish: set with a sequence's last piece.
    """

    index: int
    token: int
    text: str
    finish: Finish | None


def end_tokens(model: Any) -> frozenset[int]:
    """Tokens with which a model ends a text."""
    ends: int | list[int] | None = model.generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


class Answer:
    """Collects one sequence's tokens and decides when it ends.

    Attributes:
        tokens: so far.
        text: what has been shown so far.
        finish: set when it has ended.
    """

    def __init__(self, sampling: Sampling, end_tokens: frozenset[int], tokenizer: Any | None) -> None:
        """``end_tokens``: the model's (`end_tokens`)."""
        self._sampling, self._tokenizer = sampling, tokenizer
        self._ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else end_tokens)
        self._all = ""  # decoded, shown or not
        self._begin = self._read = 0  # tokens: whose text is decoded again for context, and whose is in it already
        self.tokens: list[int] = []
        self.text = ""
        self.finish: Finish | None = None

    def take(self, token: int) -> str:
        """Add a token; the text that can be shown now."""
        self.tokens.append(token)
        if token in self._ends:
            self._decode(len(self.tokens) - 1, last=True)
            self.finish = "stop"
        else:
            last = len(self.tokens) == self._sampling.max_new_tokens
            self._decode(len(self.tokens), last)
            self.finish = "length" if last else None
        known = len(self._all)
        places = [at for stop in self._sampling.stop if (at := self._all.find(stop)) >= 0]
        if places:
            known, self.finish = min(places), "stop"
        elif self.finish is None:
            known -= self._held_back()
        shown = self._all[len(self.text) : known]
        self.text += shown
        return shown

    def _decode(self, end: int, last: bool) -> None:
        """Text of the tokens up to ``end``; with a few tokens before them, since a token's text depends on those."""
        if self._tokenizer is None:
            return
        known = self._text(self._begin, self._read)
        longer = self._text(self._begin, end)
        if last or not longer.endswith(_BROKEN):
            self._all += longer[len(known) :]
            self._begin, self._read = self._read, end

    def _text(self, begin: int, end: int) -> str:
        assert self._tokenizer is not None
        return str(self._tokenizer.decode(self.tokens[begin:end], skip_special_tokens=True))

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        lengths = [n for stop in self._sampling.stop for n in range(1, len(stop)) if self._all.endswith(stop[:n])]
        return max(lengths, default=0)

    @property
    def completion(self) -> Completion:
        """The answer, once it has ended."""
        assert self.finish is not None
        return Completion(text=self.text, tokens=tuple(self.tokens), finish=self.finish)
