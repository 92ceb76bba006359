"""A source of tasks for tests: Python's language reference, and questions over invented towns."""

from __future__ import annotations

from bench.quality.tasks import Question, Source
from rdkv.runtime.calibration import python_reference

FILLER = "It lies in a wide valley, and few who pass through it stay for longer than they must."


def questions(count: int) -> list[Question]:
    """Questions over one document and over two, in turn; each answer is in the last document of its question alone."""
    made: list[Question] = []
    for i in range(count):
        mayor = f"Town {i} has a mayor whose name is Person {i}. {FILLER} {FILLER}"
        age = f"Person {i} is of age {1000 + i}. {FILLER} {FILLER}"
        asked = f"How old is the mayor of Town {i}?" if i % 2 else f"How old is Person {i}?"
        documents = (mayor, age) if i % 2 else (age,)
        known = (str(1000 + i), f"a thousand and {i}")
        made.append(Question(asked, known, documents, (f"Nobody lives in Hamlet {i}.",)))
    return made


SOURCE = Source(python_reference(), tuple(questions(60)))
