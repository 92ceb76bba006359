"""The metrics of LongBench v1 (Bai et al. 2024, arXiv 2308.14508) for its English tasks, each 0 to 1.

ROUGE-L is that of the package ``rouge`` and edit similarity that of ``rapidfuzz``, which the extra ``bench`` brings.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from .metrics import first_line


def f1(answer: str, reference: str) -> float:
    """F1 of the words, without case, punctuation and articles."""
    said, known = _words(answer), _words(reference)
    common = (Counter(said) & Counter(known)).total()
    return 2 * common / (len(said) + len(known)) if common else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, taken sentence by sentence."""
    from rouge import Rouge

    if not answer.strip(" .\n") or not reference.strip(" .\n"):
        return 0.0  # nothing that it could split into sentences
    return float(Rouge(metrics=["rouge-l"]).get_scores(answer, reference)[0]["rouge-l"]["f"])


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the answer names, if the right one is among them.

    A class whose name is a part of the right one's name does not count beside it.
    """
    named = [name for name in classes if name in answer and (name == reference or name not in reference)]
    return 1 / len(named) if reference in named else 0.0


def number_share(answer: str, reference: str) -> float:
    """The share of the numbers in the answer that are the reference's (the first in it)."""
    wanted = re.search(r"\d+", reference)
    numbers = re.findall(r"\d+", answer)
    return numbers.count(wanted.group()) / len(numbers) if wanted and numbers else 0.0


def edit_similarity(answer: str, reference: str) -> float:
    """Similarity by insertions and deletions of the answer's first line that is code: no comment, no fence."""
    from rapidfuzz import fuzz

    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not re.search(r"`|#|//", line)), "")
    return round(fuzz.ratio(code, reference)) / 100


def judge(
    metric: str, answer: str, references: Sequence[str], classes: Sequence[str] = (), line: bool = False
) -> float:
    """The best of a metric over references that are equals.

    Args:
        metric: ``f1``, ``rouge-l``, ``classification``, ``number`` or ``edit``.
        classes: names of all classes, for ``classification``.
        line: only the answer's first line counts.
    """
    said = first_line(answer) if line else answer
    if metric == "classification":
        return max(classification(said, reference, classes) for reference in references)
    score = {"f1": f1, "rouge-l": rouge_l, "number": number_share, "edit": edit_similarity}[metric]
    return max(score(said, reference) for reference in references)


def _words(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()
