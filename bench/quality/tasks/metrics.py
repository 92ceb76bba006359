"""The two metrics of RULER (Hsieh et al. 2024, arXiv 2404.06654): does an answer hold the reference strings?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """The share, 0 to 1, of the references that ``answer`` holds, in upper or lower case. All tasks but the QA ones."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """1 if ``answer`` holds any of the references, in upper or lower case, else 0. QA, whose references are equals."""
    return float(any(reference.lower() in answer.lower() for reference in references))
