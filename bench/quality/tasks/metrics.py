"""Metrics of answers: RULER's two (Hsieh et al. 2024, arXiv 2404.06654), a label's, and a recited passage's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

Metric = Callable[[str, Sequence[str]], float]


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """The share, 0 to 1, of the references that ``answer`` holds, in upper or lower case. All tasks but the QA ones."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """1 if ``answer`` holds any of the references, in upper or lower case, else 0. QA, whose references are equals."""
    return float(any(reference.lower() in answer.lower() for reference in references))


def first_line(answer: str) -> str:
    """The first line that is not empty."""
    return answer.lstrip("\n").split("\n")[0]


def line_match(answer: str, references: Sequence[str]) -> float:
    """1 if the first line of ``answer`` is one of the references, in upper or lower case, else 0."""
    return float(first_line(answer).strip().lower() in [reference.lower() for reference in references])


def words_recited(answer: str, references: Sequence[str]) -> float:
    """The share, 0 to 1, of the reference's words that ``answer`` has in the same order, in as many words."""
    words = references[0].split()
    blocks = SequenceMatcher(None, answer.split()[: len(words)], words, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / len(words)


def decided(metric: Metric, answer: str, references: Sequence[str]) -> bool:
    """Whether nothing that follows ``answer`` can change what ``metric`` says, so that generating may stop."""
    if metric is line_match:
        return "\n" in answer.lstrip("\n")
    if metric is words_recited:
        return len(answer.split()) > len(references[0].split())  # the last word may not be whole yet
    return metric in (string_match_all, string_match_part) and metric(answer, references) == 1
