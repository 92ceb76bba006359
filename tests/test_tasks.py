"""What all tasks have in common: length, determinism, the question apart, and the score of right and wrong answers."""

from __future__ import annotations

import pytest
from sources import SOURCE
from transformers import PreTrainedTokenizerFast

from bench.quality.tasks import TASKS, Source, available, make_sample
from bench.quality.tasks.registry import RULER
from rdkv.runtime.errors import ConfigError

REFERENCES = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3, "qa_1": 2, "qa_2": 2}
PASSAGES = {"recitation", "text"}  # their answers are running text
every_task = pytest.mark.parametrize("name", TASKS)
every_answer = pytest.mark.parametrize("name", [name for name in TASKS if name not in PASSAGES])


def test_names() -> None:
    assert set(RULER) == {
        "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
        "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
    }  # fmt: skip
    assert set(TASKS) == {*RULER, "passkey_retrieval", "kv_retrieval", "labels", *PASSAGES}


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
    assert (sample.question in sample.context) == (name in ("cwe", "text"))
    assert bool(asked) == (name != "text")
    assert len(sample.references) == len(set(sample.references)) == REFERENCES.get(name, 1)
    assert (sample.task, sample.index) == (name, seed)


@every_task
def test_determinism(name: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    again = Source(SOURCE.text, SOURCE.questions)
    sample = make_sample(name, tiny_tokenizer, SOURCE, 3000, index=2, seed=5)
    assert make_sample(name, tiny_tokenizer, again, 3000, index=2, seed=5) == sample
    assert make_sample(name, tiny_tokenizer, SOURCE, 3000, index=3, seed=5).context != sample.context
    assert make_sample(name, tiny_tokenizer, SOURCE, 3000, index=2, seed=6).context != sample.context


@every_answer
def test_answer_is_there_at_every_length(name: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for length in (2500, 6000):
        sample = make_sample(name, tiny_tokenizer, SOURCE, length, index=1)
        # Of a QA task's references, which are equals, the first is the one that the document has.
        there = sample.references[:1] if name.startswith("qa") else sample.references
        assert all(reference in sample.context for reference in there)


@every_answer
def test_score(name: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample(name, tiny_tokenizer, SOURCE, 3000)
    assert sample.score(sample.answer.upper() if name == "labels" else f"I think: {sample.answer.upper()}.") == 1
    assert sample.score("") == sample.score("none of them") == 0
    equals = name in ("qa_1", "qa_2")
    assert sample.score(sample.references[-1]) == (1 if equals else 1 / len(sample.references))


@pytest.mark.parametrize("name", [name for name in TASKS if name != "text"])  # which has room at any length
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
