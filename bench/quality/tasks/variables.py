"""Variable tracking, ``vt`` of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3.2).

A number is assigned to a variable, that variable to another, and so on over four hops, in noise; all five variables
that hold the number are the answer. A short solved example stands before it, as RULER has one.
"""

from __future__ import annotations

import random
import string

from .haystack import depths, noise, put
from .needles import distinct
from .sample import Draft, Recipe, Request

HOPS = 4
EXAMPLE_UNITS = 10  # sentences of noise in the solved example


def variable_tracking(request: Request) -> Recipe:
    """One chain of four hops in noise sentences."""
    solved = _chain(request.draw, letters=3).build(EXAMPLE_UNITS)
    example = f"{solved.context}{solved.question}{solved.opening} {', '.join(solved.references)}.\n\n"
    chain = _chain(request.draw, letters=5)

    def build(units: int) -> Draft:
        draft = chain.build(units)
        return Draft(example + draft.context, draft.question, draft.opening, draft.references)

    return Recipe(build)


def _chain(draw: random.Random, letters: int) -> Recipe:
    """A chain over variables with names of so many letters."""

    def name(draw: random.Random) -> str:
        return "".join(draw.choices(string.ascii_uppercase, k=letters))

    names = tuple(distinct(name, draw, HOPS + 1))
    value = str(draw.randrange(10_000, 100_000))
    sources = (value, *names[:-1])
    needles = [f"LET {target} = {source}." for target, source in zip(names, sources, strict=True)]
    at = depths(draw, len(needles))
    intro = "Variables are assigned here and there in the text below. Follow the assignments.\n\n"
    question = f"\n\nWhich variables hold the value {value} in the end?"
    opening = f" The {len(names)} variables that hold {value} are"

    def build(units: int) -> Draft:
        text = " ".join(put(noise(units), needles, at, range(units + 1)))
        return Draft(intro + text, question, opening, names)

    return Recipe(build)
