"""Every generated task by its name: RULER's own names, retrieval, labels, and passages of a text."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass

from transformers import PreTrainedTokenizerBase

from .documents import multi_document, single_document
from .fit import fit
from .frequencies import common_words, frequent_words
from .labels import labels
from .metrics import Metric, line_match, string_match_all, string_match_part, words_recited
from .needles import NEEDLES
from .passages import continuation, recitation
from .retrieval import key_value, passkey
from .sample import Draft, Recipe, Request, Source, TaskSample
from .variables import variable_tracking


@dataclass(frozen=True)
class Task:
    """How a task's samples are made and judged, and how many tokens its source lets an answer have."""

    make: Callable[[Request], Recipe]
    metric: Metric | None
    answer_tokens: int


RULER = (*NEEDLES, "vt", "cwe", "fwe", "qa_1", "qa_2")
TASKS: dict[str, Task] = {
    **{name: Task(make, string_match_all, 128) for name, make in NEEDLES.items()},
    "vt": Task(variable_tracking, string_match_all, 30),
    "cwe": Task(common_words, string_match_all, 120),
    "fwe": Task(frequent_words, string_match_all, 50),
    "qa_1": Task(single_document, string_match_part, 32),
    "qa_2": Task(multi_document, string_match_part, 32),
    "passkey_retrieval": Task(passkey, string_match_all, 6),
    "kv_retrieval": Task(key_value, string_match_all, 50),
    "labels": Task(labels, line_match, 8),
    "recitation": Task(recitation, words_recited, 128),
    "text": Task(continuation, None, 0),
}


def available(source: Source) -> list[str]:
    """Names of the tasks that a source has the material for: a QA task needs questions of its kind."""
    several = {len(question.documents) > 1 for question in source.questions}
    missing = {name for name, kind in (("qa_1", False), ("qa_2", True)) if kind not in several}
    return [name for name in TASKS if name not in missing]


def make_sample(
    name: str, tokenizer: PreTrainedTokenizerBase, source: Source, length: int, index: int = 0, seed: int = 0
) -> TaskSample:
    """Sample ``index`` of a task: its prompt is of at most ``length`` tokens, and but little below.

    Length, source, seed and index decide all of it.

    Raises:
        ConfigError: The length is too short for the task, or the source too short for the length.
        KeyError: There is no such task.
    """

    def count(draft: Draft) -> int:
        return sum(map(len, draft.encode(tokenizer)))

    task, order = TASKS[name], f"{seed}-{name}"
    request = Request(source, length, index, order, random.Random(f"{order}-{index}"), count)
    draft = fit(name, task.make(request), request)
    return TaskSample(**asdict(draft), task=name, index=index, metric=task.metric, answer_tokens=task.answer_tokens)
