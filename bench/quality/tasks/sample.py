"""What a task is given, what it returns, and the sample that is made of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from .haystack import Text
from .metrics import Metric, decided, string_match_part
from .questions import Question


@dataclass(frozen=True)
class Source:
    """What tasks draw from: a text for haystacks, and questions over documents for the two QA tasks."""

    text: str
    questions: tuple[Question, ...] = ()

    @cached_property
    def haystack(self) -> Text:
        """The text, cut into words."""
        return Text(self.text)

    @cached_property
    def documents(self) -> tuple[str, ...]:
        """The different documents of all questions, distractors included."""
        return tuple(dict.fromkeys(d for q in self.questions for d in (*q.documents, *q.distractors)))


@dataclass(frozen=True)
class Draft:
    """A sample's texts: what is read, what is asked, the words an answer begins with, and the reference strings."""

    context: str
    question: str
    opening: str
    references: tuple[str, ...]

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
        """Token ids of the context, special tokens included, and of the question with the answer's first words.

        They are apart, so that a model reads the same tokens whether it is asked before or after compression.
        """
        asked = tokenizer(self.question + self.opening, add_special_tokens=False)
        return list(tokenizer(self.context).input_ids), list(asked.input_ids)


@dataclass(frozen=True)
class Recipe:
    """How a sample is made of a number of haystack units; ``most`` units at most, or any number."""

    build: Callable[[int], Draft]
    most: int | None = None


@dataclass(frozen=True)
class Request:
    """One sample that is asked of a task: ``length`` tokens at most, as ``count`` counts those of a draft.

    ``order`` is a seed that all samples of a task share; ``draw`` is the sample's own.
    """

    source: Source
    length: int
    index: int
    order: str
    draw: random.Random
    count: Callable[[Draft], int]


@dataclass(frozen=True)
class TaskSample(Draft):
    """A sample of a task. A measurement compresses ``context`` alone, or all of ``prompt`` and so the question too.

    Without a ``metric`` only teacher forcing makes sense.
    """

    task: str
    index: int
    metric: Metric | None
    answer_tokens: int

    @property
    def prompt(self) -> str:
        """Everything up to the answer."""
        return self.context + self.question + self.opening

    @property
    def answer(self) -> str:
        """A right answer as text: the first reference of equals, otherwise all of them."""
        return self.references[0] if self.metric is string_match_part else ", ".join(self.references)

    def score(self, answer: str) -> float:
        """The task's metric, 0 to 1, of a generated answer."""
        assert self.metric is not None, f"task {self.task} has no metric"
        return self.metric(answer, self.references)

    def finished(self, answer: str) -> bool:
        """Whether ``answer`` decides the metric, whatever follows it."""
        return self.metric is not None and decided(self.metric, answer, self.references)
