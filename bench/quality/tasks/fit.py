"""The longest sample within a length: bisection on the number of haystack units."""

from __future__ import annotations

from bisect import bisect_right

from rdkv.runtime.errors import ConfigError

from .sample import Draft, Recipe, Request

SHORTEST = 0.95  # of the length that was asked; a source that ends below is an error


def fit(task: str, recipe: Recipe, request: Request) -> Draft:
    """The draft with the most haystack of those of at most ``request.length`` tokens.

    Nothing is cut from a draft: units are left out of the haystack only.

    Raises:
        ConfigError: The length is too short for a sample without any haystack, or too long for the source.
    """

    def tokens(units: int) -> int:
        return request.count(recipe.build(units))

    least = tokens(0)
    if least > request.length:
        raise ConfigError(f"task {task} takes at least {least} tokens here: ask for more than {request.length}")
    above = 1
    while (recipe.most is None or above < recipe.most) and tokens(above) <= request.length:
        above *= 2
    if recipe.most is not None and above >= recipe.most:
        above = recipe.most
        reached = tokens(above)
        if reached < SHORTEST * request.length:
            raise ConfigError(
                f"task {task} ends at {reached} tokens with this source: give it more, or ask for at most {reached}"
            )
    # A tokenizer may join what lies at a seam, so that one unit more can be a token less. What bisection ends at has
    # been counted all the same, and fits.
    return recipe.build(bisect_right(range(above + 1), request.length, key=tokens) - 1)
