"""Needles in a haystack: the eight tasks ``niah_*`` of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3.1).

A needle gives a key a value; the question asks for all values of some keys.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .haystack import depths, noise, put, sentence_ends
from .sample import Draft, Recipe, Request
from .words import compound, identifier, number

Draw = Callable[[random.Random], str]


@dataclass(frozen=True)
class Needles:
    """A task: its haystack (``noise``, ``text`` or ``needles``), keys and values, and how many of each are asked."""

    haystack: str
    key: Draw = compound
    value: Draw = number
    keys: int = 1
    values: int = 1
    asked: int = 1

    @property
    def noun(self) -> str:
        """What a value is called."""
        return "number" if self.value is number else "identifier"

    def sentence(self, key: str, value: str) -> str:
        """The needle itself."""
        return f"A secret {self.noun} for {key} is {value}."

    def __call__(self, request: Request) -> Recipe:
        """Draw keys, values and depths, whatever the length of the haystack."""
        draw = request.draw
        keys = distinct(self.key, draw, self.keys)
        values = distinct(self.value, draw, self.keys * self.values)
        pairs = [(key, values[i * self.values + j]) for i, key in enumerate(keys) for j in range(self.values)]
        asked = draw.sample(keys, self.asked)
        references = tuple(value for name in asked for key, value in pairs if key == name)
        needles = [self.sentence(*pair) for pair in draw.sample(pairs, len(pairs))]
        at = depths(draw, len(needles))
        hay = self.hay(request, set(keys))
        noun = self.noun + "s" * (len(references) > 1)
        verb = "are" if len(references) > 1 else "is"
        names = " and ".join(filter(None, [", ".join(asked[:-1]), asked[-1]]))
        intro = f"The text below hides secret {self.noun}s. Remember them: a question about them follows.\n\n"
        question = f"\n\nWhich secret {noun} for {names} {verb} in the text?"

        def build(units: int) -> Draft:
            parts = hay(units)
            places = sentence_ends(parts) if self.haystack == "text" else range(len(parts) + 1)
            text = ("\n" if self.haystack == "needles" else " ").join(put(parts, needles, at, places))
            return Draft(intro + text, question, f" The secret {noun} for {names} {verb}", references)

        return Recipe(build)

    def hay(self, request: Request, taken: set[str]) -> Callable[[int], list[str]]:
        """A function from a number to so many units of haystack: sentences, words, or needles of other keys."""
        if self.haystack == "noise":
            return noise
        if self.haystack == "text":
            text = request.source.haystack
            start = request.draw.choice(text.starts)
            return lambda units: text.take(start, units)
        seed = request.draw.random()

        def others(units: int) -> list[str]:
            draw = random.Random(seed)  # the same needles again, however many are wanted
            return [self.sentence(distinct(self.key, draw, 1, taken)[0], self.value(draw)) for _ in range(units)]

        return others


def distinct(one: Draw, draw: random.Random, count: int, taken: set[str] | frozenset[str] = frozenset()) -> list[str]:
    """So many different strings, none of them ``taken``."""
    found: dict[str, None] = {}
    while len(found) < count:
        new = one(draw)
        if new not in taken:
            found[new] = None
    return list(found)


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("text"),
    "niah_single_3": Needles("text", value=identifier),
    "niah_multikey_1": Needles("text", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key=identifier, value=identifier),
    "niah_multivalue": Needles("text", values=4),
    "niah_multiquery": Needles("text", keys=4, asked=4),
}
