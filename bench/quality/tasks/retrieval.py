"""Pass key and key-value retrieval as in InfiniteBench (Zhang et al. 2024, arXiv 2402.13718, section 3).

Their metric here is RULER's `string_match_all`; InfiniteBench takes the first integer, and a whole word, of an answer.
"""

from __future__ import annotations

import json
import random

from .haystack import noise, put
from .needles import distinct
from .sample import Draft, Recipe, Request
from .words import identifier


def passkey(request: Request) -> Recipe:
    """A number of five digits in noise sentences."""
    key, depth = str(request.draw.randrange(10_000, 100_000)), request.draw.random()
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    intro = "One important fact is hidden in much text that does not matter. Find it and remember it.\n\n"

    def build(units: int) -> Draft:
        text = " ".join(put(noise(units), [needle], [depth], range(units + 1)))
        return Draft(intro + text, "\n\nWhat is the pass key?", " The pass key is", (key,))

    return Recipe(build)


def key_value(request: Request) -> Recipe:
    """One value of a JSON object whose keys and values are UUIDs."""
    key, value = distinct(identifier, request.draw, 2)
    depth, seed = request.draw.random(), request.draw.random()
    intro = "Find the value of a key in the JSON object below.\n\n"

    def line(key: str, value: str) -> str:
        return f"{json.dumps(key)}: {json.dumps(value)}"

    def build(units: int) -> Draft:
        draw = random.Random(seed)  # the same pairs again, however many are wanted
        others = [line(*distinct(identifier, draw, 2, {key})) for _ in range(units)]
        pairs = put(others, [line(key, value)], [depth], range(units + 1))
        text = "{" + ",\n".join(pairs) + "}"
        return Draft(intro + text, f"\n\nWhat is the value of the key {json.dumps(key)}?", " The value is", (value,))

    return Recipe(build)
