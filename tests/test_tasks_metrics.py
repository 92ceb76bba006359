"""RULER's two metrics on right, partly right and wrong answers."""

from __future__ import annotations

import pytest

from bench.quality.tasks.metrics import string_match_all, string_match_part


@pytest.mark.parametrize(
    ("answer", "share"),
    [("1, 2, 3 and 4", 1.0), ("4 2", 0.5), ("3", 0.25), ("", 0.0), ("five", 0.0)],
)
def test_all(answer: str, share: float) -> None:
    assert string_match_all(answer, ["1", "2", "3", "4"]) == share


@pytest.mark.parametrize(("answer", "score"), [("It was PARIS.", 1.0), ("the capital of france", 1.0), ("Rome", 0.0)])
def test_part(answer: str, score: float) -> None:
    assert string_match_part(answer, ["Paris", "The capital of France"]) == score


def test_case_does_not_matter() -> None:
    assert string_match_all("brave-RIVER", ["Brave-River", "Hill"]) == 0.5
