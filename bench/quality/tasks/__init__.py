"""Tasks: RULER's thirteen, retrieval, labels and passages, generated at any length, and LongBench."""

from .catalogue import Catalogue
from .haystack import read_texts
from .questions import Question, answers, read_questions
from .registry import TASKS, available, make_sample
from .sample import Source, TaskSample

__all__ = [
    "TASKS", "Catalogue", "Question", "Source", "TaskSample", "answers", "available", "make_sample", "read_questions",
    "read_texts",
]  # fmt: skip
