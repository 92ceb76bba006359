"""One prompt to measure on, in tokens: what is read, what is asked, and the reference answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Protocol = Literal["seen", "after"]  # the question is seen by the compression, or asked after it
Half = Literal["tune", "report"]
PROTOCOLS: tuple[Protocol, ...] = ("seen", "after")
HALVES: tuple[Half, ...] = ("tune", "report")


@dataclass(frozen=True)
class Sample:
    """A sample of a task for one model.

    Attributes:
        task, index, seed: which sample it is.
        context, question: token ids of what is read and of what is asked, the answer's first words included; a text
            that is only continued has no question.
        answer: token ids of the reference answer, for teacher forcing.
        answer_tokens: tokens that a generated answer may have.
        judge: the task's metric of a generated answer, 0 to 1; None where only teacher forcing makes sense.
        finished: whether what was generated so far decides the metric.
    """

    task: str
    index: int
    seed: int
    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    answer_tokens: int
    judge: Callable[[str], float] | None = None
    finished: Callable[[str], bool] = lambda text: False

    @property
    def half(self) -> Half:
        """The half it belongs to, see `half_of`."""
        return half_of(self.task, self.index, self.seed)

    @cached_property
    def digest(self) -> str:
        """Sixteen digits that its tokens decide."""
        text = json.dumps([self.task, self.context, self.question, self.answer])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """Protocols that differ for it: without a question there is only one."""
        return PROTOCOLS if self.question else ("seen",)

    def compressed(self, protocol: Protocol) -> tuple[int, ...]:
        """Token ids that the compression sees."""
        return self.context + self.question if protocol == "seen" else self.context

    def asked(self, protocol: Protocol) -> tuple[int, ...]:
        """Token ids between those and the answer."""
        return () if protocol == "seen" else self.question


def half_of(task: str, index: int, seed: int) -> Half:
    """The half of a sample, whatever the model: settings are chosen on one half and reported on the other.

    Of two neighbours (samples 0 and 1, 2 and 3, and so on of a task) one is in each half; a hash says which.
    """
    pair = f"{task}/{seed}/{index // 2}"
    flipped = hashlib.sha256(pair.encode()).digest()[0] % 2
    return HALVES[(index + flipped) % 2]


def batches(samples: Sequence[Sample], protocol: Protocol, size: int, same_question: bool) -> list[list[Sample]]:
    """Samples whose compressed tokens are equally many, at most ``size`` together, in order of their first one.

    Args:
        same_question: what is asked must be as long, too, as generating in a batch needs.
    """
    open_groups: dict[tuple[int, int], list[Sample]] = {}
    done: list[list[Sample]] = []
    for sample in samples:
        key = (len(sample.compressed(protocol)), len(sample.asked(protocol)) if same_question else 0)
        group = open_groups.setdefault(key, [])
        if not group:
            done.append(group)
        group.append(sample)
        if len(group) == size:
            del open_groups[key]
    return done
