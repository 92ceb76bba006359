"""Tasks by name: groups, what there is material for, halves, and mistakes that say what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sources import SOURCE
from transformers import PreTrainedTokenizerFast

from bench.quality.sample import half_of
from bench.quality.tasks import TASKS, Catalogue, Source, make_sample
from bench.quality.tasks.registry import RULER
from rdkv.runtime.errors import ConfigError

PLAIN = Catalogue(Source(SOURCE.text), None, length=1500, samples=4)


@pytest.fixture
def real(tmp_path: Path) -> Catalogue:
    row = {"input": "Who?", "context": "Ann came. ", "answers": ["Ann"], "all_classes": None}
    (tmp_path / "musique.json").write_text(json.dumps([row] * 3))
    return Catalogue(SOURCE, str(tmp_path), length=1500, samples=6)


def test_names_and_groups(real: Catalogue) -> None:
    assert real.names == [*TASKS, "longbench/musique"]
    assert real.resolve(["longbench", "ruler", "vt"]) == ["longbench/musique", *RULER]
    assert real.resolve(["all"]) == real.names
    assert real.resolve(["generated"]) == list(TASKS)
    assert "qa_1" not in PLAIN.resolve(["ruler"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("niah_singel_1", "did you mean 'niah_single_1'"),
        ("qa_1", "give --questions"),
        ("longbench/qasper", "give --data"),
        ("longbench", "give --data"),
        ("rulr", "did you mean 'ruler'"),
        ("nothing like it", "known: niah_single_1"),
    ],
)
def test_mistakes(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PLAIN.resolve([name])


def test_an_unknown_task_of_longbench(real: Catalogue) -> None:
    with pytest.raises(ConfigError, match="did you mean 'longbench/musique'"):
        real.resolve(["longbench/musiqe"])


def test_samples_in_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    samples = list(replace(PLAIN, seed=3).make(tiny_tokenizer, "passkey_retrieval"))
    assert [sample.index for sample in samples] == [0, 1, 2, 3]
    for sample in samples:
        made = make_sample("passkey_retrieval", tiny_tokenizer, SOURCE, 1500, sample.index, seed=3)
        assert tiny_tokenizer.decode(sample.compressed("seen")) == made.prompt
        assert tiny_tokenizer.decode(sample.answer) == f" {made.answer}"
        assert sample.judge is not None
        assert (sample.judge(made.answer), sample.judge("")) == (1.0, 0.0)
        assert sample.finished(made.answer)
    assert len({sample.digest for sample in samples}) == 4


def test_halves_make_up_the_whole(real: Catalogue, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for task in ("passkey_retrieval", "longbench/musique"):
        whole = [sample.index for sample in real.make(tiny_tokenizer, task)]
        assert whole == list(range(3 if task.startswith("longbench") else 6))
        parts = [list(replace(real, halves=(half,)).make(tiny_tokenizer, task)) for half in ("tune", "report")]
        assert sorted(sample.index for part in parts for sample in part) == whole
        assert all(sample.half == half for part, half in zip(parts, ("tune", "report"), strict=True) for sample in part)
        assert all(sample.half == half_of(task, sample.index, 0) for part in parts for sample in part)
