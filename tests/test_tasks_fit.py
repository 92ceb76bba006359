"""Bisection finds the most haystack that fits, also where a unit more may be a token less."""

from __future__ import annotations

import random

import pytest

from bench.quality.tasks.fit import fit
from bench.quality.tasks.sample import Draft, Recipe, Request, Source
from rdkv.runtime.errors import ConfigError


def request(length: int) -> Request:
    return Request(Source("text"), length, 0, "0", random.Random(0), lambda draft: len(draft.context))


def recipe(most: int | None = None, waves: tuple[int, ...] = (0,)) -> Recipe:
    return Recipe(lambda n: Draft("x" * (10 + 5 * n + waves[n % len(waves)]), "", "", ("",)), most)


@pytest.mark.parametrize("length", range(10, 120, 7))
def test_the_most_that_fits(length: int) -> None:
    assert len(fit("task", recipe(), request(length)).context) == 10 + (length - 10) // 5 * 5


@pytest.mark.parametrize("length", range(40, 200))
def test_uneven_counts(length: int) -> None:
    reached = len(fit("task", recipe(waves=(0, 7, -3)), request(length)).context)
    assert length - 15 < reached <= length


def test_errors_name_the_lengths() -> None:
    with pytest.raises(ConfigError, match="task needle takes at least 10 tokens here: ask for more than 9"):
        fit("needle", recipe(), request(9))
    with pytest.raises(ConfigError, match=r"task qa ends at 25 tokens with this source: .* at most 25"):
        fit("qa", recipe(most=3), request(100))


def test_a_source_that_just_lasts() -> None:
    assert len(fit("task", recipe(most=18), request(103)).context) == 100
    assert len(fit("task", recipe(most=18), request(61)).context) == 60
    assert len(fit("task", recipe(most=0), request(10)).context) == 10
