"""Counting words: ``cwe`` and ``fwe`` of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3.3)."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence

from .needles import distinct
from .sample import Draft, Recipe, Request
from .words import ADJECTIVES, NOUNS

COMMON = 10  # words that are asked for in `common_words`
LEAST_CODED = 80  # words of a coded text: from here on the four highest counts of `frequent_words` differ


def common_words(request: Request) -> Recipe:
    """A numbered list in which ten words come 30 times and all others 3 times; a short solved list stands before it.

    In a length of which 30 times ten words take more than half they come 6 times, and the others once. Words are
    those of the haystack text; when it has no more, hyphenated ones. The solved list ends in the very question, which
    is therefore never news to the compression.
    """
    draw, known = request.draw, request.source.haystack.vocabulary
    compounds = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    words = draw.sample(known, len(known)) + draw.sample(compounds, len(compounds))
    solved = _listed(words[:COMMON], words[COMMON : 2 * COMMON], 3, 1, seed=draw.random())
    example = f"{solved.context}{solved.question}{solved.opening} {', '.join(solved.references)}.\n\n"
    common, others, seed = words[2 * COMMON : 3 * COMMON], words[3 * COMMON :], draw.random()

    def build_with(often: int, seldom: int, units: int) -> Draft:
        draft = _listed(common, others[:units], often, seldom, seed)
        return Draft(example + draft.context, draft.question, draft.opening, draft.references)

    often, seldom = (30, 3) if request.count(build_with(30, 3, 0)) <= request.length / 2 else (6, 1)
    return Recipe(lambda units: build_with(often, seldom, units), most=len(others))


def _listed(common: Sequence[str], others: Sequence[str], often: int, seldom: int, seed: float) -> Draft:
    """A shuffled, numbered list."""
    items = [*common] * often + [*others] * seldom
    random.Random(seed).shuffle(items)
    text = " ".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    intro = "In the numbered list below some words come more often than others. Keep count of them.\n\n"
    question = f"\n\nWhich {COMMON} words come most often in the list?"
    return Draft(intro + text, question, f" The {COMMON} words that come most often are", tuple(common))


def frequent_words(request: Request) -> Recipe:
    """Coded words with counts that fall as the square of their rank (Zipf's law, exponent 2).

    The first rank is filler, dots, and the three that follow are the answer. There is one word to 50 tokens of the
    length, of which short texts use the first ones.
    """

    def coded(draw: random.Random) -> str:
        return "".join(draw.choices(string.ascii_lowercase, k=6))

    words = ["...", *distinct(coded, request.draw, max(10, request.length // 50))]
    seed = request.draw.random()
    intro = "The text below is of coded words. Keep count of how often each of them comes.\n\n"
    question = "\n\nDots do not count. Which three coded words come most often in the text?"
    opening = " The three coded words that come most often are"

    def build(units: int) -> Draft:
        total = (LEAST_CODED + units) * 6 / math.pi**2  # the sum of 1 / rank^2 is pi^2 / 6
        text = [word for rank, word in enumerate(words, 1) for _ in range(int(total / rank**2))]
        random.Random(seed).shuffle(text)
        return Draft(intro + " ".join(text), question, opening, tuple(words[1:4]))

    return Recipe(build)
