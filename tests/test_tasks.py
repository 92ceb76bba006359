"""What all tasks have in common: length, determinism, the question apart, and the score of right and wrong answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sources import SOURCE
from transformers import PreTrainedTokenizerFast

from bench.quality.prompts import generated, longbench
from bench.quality.table import SYNTHETIC
from bench.quality.tasks import TASKS, Source, available, make_sample
from rdkv.runtime.errors import ConfigError

RULER = {
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
}  # fmt: skip
REFERENCES = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3, "qa_1": 2, "qa_2": 2}
every_task = pytest.mark.parametrize("name", TASKS)


def test_names() -> None:
    assert set(TASKS) == RULER | {"passkey_retrieval", "kv_retrieval"}
    assert set(TASKS) < SYNTHETIC


@every_task
@pytest.mark.parametrize("length", [3000, 4567, 9000])
@pytest.mark.parametrize("seed", [0, 1])
def test_length(name: str, length: int, seed: int, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample(name, tiny_tokenizer, SOURCE, length, index=seed, seed=seed)
    context, asked = sample.encode(tiny_tokenizer)
    assert 0.95 * length <= len(context) + len(asked) <= length
    # The parts are the prompt's own tokens, and neither the question nor its answer's first words are in the context.
    assert context + asked == tiny_tokenizer(sample.prompt).input_ids
    # (But for common words, whose solved example has the same question.)
    assert (sample.question in sample.context) == (name == "cwe")
    assert len(sample.references) == len(set(sample.references)) == REFERENCES.get(name, 1)
    assert (sample.task, sample.index) == (name, seed)


@every_task
def test_determinism(name: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    again = Source(SOURCE.text, SOURCE.questions)
    sample = make_sample(name, tiny_tokenizer, SOURCE, 3000, index=2, seed=5)
    assert make_sample(name, tiny_tokenizer, again, 3000, index=2, seed=5) == sample
    assert make_sample(name, tiny_tokenizer, SOURCE, 3000, index=3, seed=5).context != sample.context
    assert make_sample(name, tiny_tokenizer, SOURCE, 3000, index=2, seed=6).context != sample.context


@every_task
def test_answer_is_there_at_every_length(name: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for length in (2500, 6000):
        sample = make_sample(name, tiny_tokenizer, SOURCE, length, index=1)
        # Of a QA task's references, which are equals, the first is the one that the document has.
        there = sample.references[:1] if name.startswith("qa") else sample.references
        assert all(reference in sample.context for reference in there)


@every_task
def test_score(name: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample(name, tiny_tokenizer, SOURCE, 3000)
    assert sample.score(f"I think: {sample.answer.upper()}.") == 1
    assert sample.score("") == sample.score("none of them") == 0
    equals = name in ("qa_1", "qa_2")
    assert sample.score(sample.references[-1]) == (1 if equals else 1 / len(sample.references))


@every_task
def test_too_short(name: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="ask for more"):
        make_sample(name, tiny_tokenizer, SOURCE, 100)


def test_available() -> None:
    single = tuple(question for question in SOURCE.questions if len(question.documents) == 1)
    several = tuple(question for question in SOURCE.questions if len(question.documents) > 1)
    assert available(SOURCE) == list(TASKS)
    assert set(TASKS) - set(available(Source("text", single))) == {"qa_2"}
    assert set(TASKS) - set(available(Source("text", several))) == {"qa_1"}
    assert set(TASKS) - set(available(Source("text"))) == {"qa_1", "qa_2"}


def test_generated_for_teacher_forcing(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    samples = list(generated(SOURCE, tiny_tokenizer, 2, 3000, seed=1))
    assert [(sample.task, sample.index) for sample in samples] == [(name, i) for name in TASKS for i in range(2)]
    for sample in samples:
        made = make_sample(sample.task, tiny_tokenizer, SOURCE, 3000, sample.index, seed=1)
        assert tiny_tokenizer.decode(sample.prompt) == made.prompt
        assert tiny_tokenizer.decode(sample.answer) == f" {made.answer}"


def test_longbench_answers(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"origin_prompt": "p", "gold": gold} for gold in ("['one', 'two']", "{'answers': ['three']}", "plain")]
    (tmp_path / "task.json").write_text(json.dumps({str(i): row for i, row in enumerate(rows)}))
    samples = longbench(tmp_path, tiny_tokenizer, ["task"], 3, 100, answer=100)
    assert [tiny_tokenizer.decode(sample.answer) for sample in samples] == [" one", " three", " plain"]
