"""Questions over documents from a JSON file: of LongBench, SQuAD or HotpotQA."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdkv.runtime.errors import ConfigError


@dataclass(frozen=True)
class Question:
    """A question, its right answers, the documents it needs, and others that belong to it."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    distractors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.answers and self.documents):
            raise ValueError(f"the question {self.text!r} has no answer or no document")


def read_questions(path: Path) -> tuple[Question, ...]:
    """The questions of a ``.json`` file, or of a ``.jsonl`` file with a row to a line.

    Rows are LongBench's (``input``, ``context``, ``answers``, or a ready ``origin_prompt`` with ``gold``) or
    HotpotQA's; an object with ``data`` is SQuAD's.

    Raises:
        ConfigError: The file cannot be read, or holds none of these.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        if isinstance(content, dict) and "data" in content:
            found = tuple(_squad(content["data"]))
        else:
            found = tuple(_row(row) for row in (content.values() if isinstance(content, dict) else content))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read questions from {path}, of LongBench, SQuAD or HotpotQA: {error}") from error
    if not found:
        raise ConfigError(f"{path} holds no questions: give a file of LongBench, SQuAD or HotpotQA")
    return found


def answers(gold: object) -> tuple[str, ...]:
    """Reference answers: of a list, a dict with ``answers``, a plain value, or any of them written as Python."""
    if isinstance(gold, str):
        try:
            gold = ast.literal_eval(gold)
        except (ValueError, SyntaxError):
            return (str(gold),)
    if isinstance(gold, dict):
        gold = gold["answers"]
    return tuple(map(str, gold)) if isinstance(gold, list) else (str(gold),)


def _row(row: dict[str, Any]) -> Question:
    kinds: dict[str, Callable[[dict[str, Any]], Question]] = {
        "supporting_facts": _hotpotqa, "origin_prompt": _longbench_prompt, "context": _longbench,
    }  # fmt: skip
    for field, read in kinds.items():
        if field in row:
            return read(row)
    raise ValueError(f"a row has none of {', '.join(kinds)}")


def _longbench(row: dict[str, Any]) -> Question:
    return Question(row["input"].strip(), tuple(row["answers"]), _passages(row["context"]))


def _longbench_prompt(row: dict[str, Any]) -> Question:
    """An instruction, an empty line, the passages, the instruction again, and the question."""
    body, mark, asked = row["origin_prompt"].rpartition("\n\nQuestion:")
    _, first, body = body.partition("\n\n")
    body, last, _ = body.rpartition("\n\n")
    if not (mark and first and last):
        raise ValueError("a prompt does not end in passages, instruction and 'Question:'")
    text = asked.removesuffix("Answer:").strip()
    return Question(text, answers(row["gold"]), _passages(body.removeprefix("The following are given passages.\n")))


def _passages(text: str) -> tuple[str, ...]:
    """The parts under lines ``Passage 1:`` and so on, or all of the text as one."""
    return tuple(part.strip() for part in re.split(r"^Passage \d+:\n", text, flags=re.MULTILINE) if part.strip())


def _hotpotqa(row: dict[str, Any]) -> Question:
    """What the supporting facts lie in is needed; the row's other passages are distractors."""
    needed = {title for title, _ in row["supporting_facts"]}
    passages = [(title in needed, f"{title}\n{''.join(sentences)}") for title, sentences in row["context"]]
    documents, others = (tuple(text for known, text in passages if known is kind) for kind in (True, False))
    return Question(row["question"], (row["answer"],), documents, others)


def _squad(articles: list[dict[str, Any]]) -> Iterator[Question]:
    """The paragraph is needed; the others of its article are distractors. Questions without answer are left out."""
    for article in articles:
        paragraphs = [paragraph["context"] for paragraph in article["paragraphs"]]
        for at, paragraph in enumerate(article["paragraphs"]):
            others = tuple(paragraphs[:at] + paragraphs[at + 1 :])
            for row in paragraph["qas"]:
                known = tuple(dict.fromkeys(answer["text"] for answer in row["answers"]))
                if known:
                    yield Question(row["question"], known, (paragraph["context"],), others)
