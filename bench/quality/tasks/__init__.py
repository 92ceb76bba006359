"""Synthetic tasks of any length: RULER's thirteen, and pass key and key-value retrieval."""

from .haystack import read_texts
from .questions import Question, answers, read_questions
from .registry import TASKS, available, make_sample
from .sample import Source, TaskSample

__all__ = [
    "TASKS", "Question", "Source", "TaskSample", "answers", "available", "make_sample", "read_questions", "read_texts",
]  # fmt: skip
