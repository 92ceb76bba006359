"""LongBench's rows, from its own files, ready prompts and the hub; cutting, splitting and judging."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from bench.quality.tasks.longbench import Row, available, make_sample, read_rows, specs
from rdkv.runtime.errors import ConfigError

QA = {"input": "Who?", "context": "Ann came. " * 40, "answers": ["Ann", "Anna"], "all_classes": None}
TREC = {
    "input": "Question: Where is it ?\nType:", "context": "Question: Who is it ?\nType: Person\n" * 5,
    "answers": ["Place"], "all_classes": ["Place", "Person"],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(QA) + "\n\n" + json.dumps({**QA, "input": "Why?"}) + "\n")
    gold = "{'answers': ['Place'], 'all_classes': ['Place', 'Person']}"
    ready = {"origin_prompt": TREC["context"] + TREC["input"], "gold": gold}
    (tmp_path / "trec.json").write_text(json.dumps({"0": ready}))
    code = {
        "origin_prompt": "Please complete the code given below. \nx = 1\nNext line of code:\n",
        "gold": "['    y = x']",
    }
    (tmp_path / "lcc.json").write_text(json.dumps([code]))
    return tmp_path


def test_specs_are_longbench() -> None:
    assert len(specs()) == 16
    for name, spec in specs().items():
        assert spec.asks in spec.prompt or spec.prompt.endswith("{input}"), name  # which begins with it
        assert "{context}" in spec.prompt
        assert spec.metric in ("f1", "rouge-l", "classification", "number", "edit")


def test_rows_of_its_own_files(folder: Path) -> None:
    rows = read_rows("hotpotqa", str(folder))
    assert len(rows) == 2
    assert rows[0].context.startswith("Answer the question based on the given passages.")
    assert rows[0].context.endswith("Ann came. \n\n")
    assert rows[0].question.endswith("Question: Who?\nAnswer:")
    assert rows[0].references == ("Ann", "Anna")
    assert available(str(folder)) == ["hotpotqa", "trec", "lcc"]


def test_ready_prompts(folder: Path) -> None:
    (row,) = read_rows("trec", str(folder))
    assert row == Row(TREC["context"], str(TREC["input"]), ("Place",), ("Place", "Person"))
    (code,) = read_rows("lcc", str(folder))
    assert (code.question, code.references) == ("Next line of code:\n", ("    y = x",))


def test_the_same_prompt_from_both_kinds_of_row(tmp_path: Path) -> None:
    (tmp_path / "trec.json").write_text(json.dumps([TREC]))
    (row,) = read_rows("trec", str(tmp_path))
    assert row.question == TREC["input"]
    assert row.context.startswith("Please determine the type of the question below.")
    assert row.classes == ("Place", "Person")


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: str, **options: str) -> list[dict[str, Any]]:
        asked.append((*names, options))
        return [QA]

    library = ModuleType("datasets")
    vars(library)["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert read_rows("musique", "hub")[0].references == ("Ann", "Anna")
    assert asked == [("THUDM/LongBench", "musique", {"revision": "refs/convert/parquet", "split": "test"})]
    assert available("hub") == list(specs())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        read_rows("musique", "hub")


def test_the_middle_is_cut(folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    row = read_rows("hotpotqa", str(folder))[0]
    whole = make_sample("hotpotqa", row, tiny_tokenizer, 5000, 0)
    cut = make_sample("hotpotqa", row, tiny_tokenizer, 601, 0)
    prompt = whole.compressed("seen")
    assert tiny_tokenizer.decode(prompt) == row.context + row.question
    assert cut.compressed("seen") == prompt[:300] + prompt[-301:]
    assert cut.question == whole.question == cut.asked("after")
    assert tiny_tokenizer.decode(cut.answer) == " Ann"
    assert cut.answer_tokens == 32
    with pytest.raises(ConfigError, match="longer --length"):
        make_sample("hotpotqa", row, tiny_tokenizer, 100, 0)


def test_judging(folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    qa = make_sample("hotpotqa", read_rows("hotpotqa", str(folder))[0], tiny_tokenizer, 5000, 0)
    kind = make_sample("trec", read_rows("trec", str(folder))[0], tiny_tokenizer, 5000, 0)
    code = make_sample("lcc", read_rows("lcc", str(folder))[0], tiny_tokenizer, 5000, 0)
    assert qa.judge is not None
    assert kind.judge is not None
    assert code.judge is not None
    assert (qa.judge("the Anna."), qa.judge("Bob")) == (1.0, 0.0)
    assert (kind.judge(" Place\nPerson"), kind.judge("Place Person"), kind.judge("Person")) == (1.0, 0.5, 0.0)
    assert (kind.finished("Place\n"), kind.finished("\nPlace"), qa.finished("a\nb")) == (True, False, False)
    assert code.judge("```\n    y = x\n") == 1.0
    assert tiny_tokenizer.decode(code.answer) == "    y = x"  # the question ends a line: nothing comes between


def test_errors(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no qasper\.json"):
        read_rows("qasper", str(folder))
    (folder / "qasper.json").write_text('[{"origin_prompt": "no question", "gold": "x"}]')
    with pytest.raises(ConfigError, match="a prompt has no"):
        read_rows("qasper", str(folder))
    (folder / "qasper.json").write_text("[{}]")
    with pytest.raises(ConfigError, match="cannot read longbench/qasper"):
        read_rows("qasper", str(folder))
