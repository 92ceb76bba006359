"""Questions from files of LongBench, SQuAD and HotpotQA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.quality.tasks import Question, answers, read_questions
from rdkv.runtime.errors import ConfigError

TWO = "Passage 1:\nRome\nRome is old.\n\nVery old.\nPassage 2:\nOslo\nOslo is cold."
PASSAGES = ("Rome\nRome is old.\n\nVery old.", "Oslo\nOslo is cold.")
RULES = "Answer from the passages. Only give me the answer."


def written(folder: Path, content: Any) -> Path:
    path = folder / "questions.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("body", "documents"),
    [
        (f"The following are given passages.\n{TWO}", PASSAGES),
        ("A story.\n\nIt goes on.", ("A story.\n\nIt goes on.",)),
    ],
)
@pytest.mark.parametrize("end", ["\nAnswer:", "\n\nAnswer:"])
def test_longbench_prompts(tmp_path: Path, body: str, documents: tuple[str, ...], end: str) -> None:
    prompt = f"{RULES}\n\n{body}\n\n{RULES}\n\nQuestion: Which is old?{end}"
    path = written(tmp_path, {"0": {"origin_prompt": prompt, "gold": "['Rome', 'the first']", "time": 1}})
    assert read_questions(path) == (Question("Which is old?", ("Rome", "the first"), documents),)


def test_longbench_rows_by_line(tmp_path: Path) -> None:
    rows = [{"input": "Which?", "context": TWO, "answers": ["Rome"], "length": 9}] * 2
    path = tmp_path / "hotpotqa.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_questions(path) == (Question("Which?", ("Rome",), PASSAGES),) * 2


def test_hotpotqa(tmp_path: Path) -> None:
    row = {
        "question": "Which?", "answer": "Rome", "supporting_facts": [["Rome", 0], ["Oslo", 1], ["Rome", 1]],
        "context": [["Rome", ["Rome is old.", " Very."]], ["Bern", ["Bern."]], ["Oslo", ["Oslo is cold."]]],
    }  # fmt: skip
    expected = Question("Which?", ("Rome",), ("Rome\nRome is old. Very.", "Oslo\nOslo is cold."), ("Bern\nBern.",))
    assert read_questions(written(tmp_path, [row])) == (expected,)


def test_squad(tmp_path: Path) -> None:
    asked = {"question": "Which?", "answers": [{"text": "Rome"}, {"text": "Rome"}, {"text": "old Rome"}]}
    impossible = {"question": "Why?", "answers": [], "is_impossible": True}
    paragraphs = [{"context": "One.", "qas": []}, {"context": "Two.", "qas": [asked, impossible]}]
    path = written(tmp_path, {"version": "2", "data": [{"title": "t", "paragraphs": paragraphs}]})
    assert read_questions(path) == (Question("Which?", ("Rome", "old Rome"), ("Two.",), ("One.",)),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"origin_prompt": "no passages at all", "gold": "x"}], "does not end in passages"),
        ([{"input": "?", "context": "text", "answers": []}], "has no answer"),
        ([{"input": "?", "context": "text"}], "cannot read questions .* 'answers'"),
        ([{"other": 1}], "a row has none of supporting_facts, origin_prompt, context"),
        ([], "holds no questions"),
        ({"data": []}, "holds no questions"),
        ([1], "cannot read questions from"),
        (3, "cannot read questions from"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_questions(written(tmp_path, content))


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read questions from"):
        read_questions(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read questions from"):
        read_questions(tmp_path / "broken.json")


@pytest.mark.parametrize(
    ("gold", "expected"),
    [("['a', 'b']", ("a", "b")), ("{'answers': ['c']}", ("c",)), (["d"], ("d",)), ("plain text", ("plain text",)),
     ("2010", ("2010",)), ("can't", ("can't",))],
)  # fmt: skip
def test_answers(gold: object, expected: tuple[str, ...]) -> None:
    assert answers(gold) == expected
