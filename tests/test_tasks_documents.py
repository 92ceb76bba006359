"""A question's documents are all there, whole, among distractors."""

from __future__ import annotations

import re

import pytest
from sources import SOURCE, questions
from transformers import PreTrainedTokenizerFast

from bench.quality.tasks import Question, Source, TaskSample, make_sample
from rdkv.runtime.errors import ConfigError


def asked(sample: TaskSample) -> Question:
    (found,) = (question for question in SOURCE.questions if sample.question.endswith(question.text))
    return found


def documents(sample: TaskSample) -> list[str]:
    return re.split(r"\n\nDocument \d+:\n", sample.context)[1:]


@pytest.mark.parametrize(("name", "needed"), [("qa_1", 1), ("qa_2", 2)])
@pytest.mark.parametrize("length", [800, 2000, 8000])
@pytest.mark.parametrize("seed", [0, 1])
def test_documents_are_whole(
    name: str, needed: int, length: int, seed: int, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    sample = make_sample(name, tiny_tokenizer, SOURCE, length, seed=seed)
    question, found = asked(sample), documents(sample)
    assert len(question.documents) == needed
    assert set(question.documents) <= set(found)
    assert sample.references == question.answers
    assert len(found) == len(set(found)) > needed
    # Only one distractor, the last that was taken, may be cut.
    known = {document for q in SOURCE.questions for document in (*q.documents, *q.distractors)}
    cut = [document for document in found if document not in known]
    assert len(cut) <= 1
    assert all(any(document.startswith(part) for document in known) for part in cut)


def test_own_distractors_first(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample("qa_1", tiny_tokenizer, SOURCE, 2000)
    assert asked(sample).distractors[0] in documents(sample)


def test_samples_take_different_questions(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    samples = [make_sample("qa_1", tiny_tokenizer, SOURCE, 1000, index) for index in range(30)]
    assert len({sample.question for sample in samples}) == 30
    assert make_sample("qa_1", tiny_tokenizer, SOURCE, 1000, 30).question == samples[0].question


def test_place_of_the_answer_varies(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    samples = [make_sample("qa_1", tiny_tokenizer, SOURCE, 2500, index) for index in range(12)]
    places = {documents(sample).index(asked(sample).documents[0]) for sample in samples}
    assert len(places) > 4


def test_long_questions_are_passed_over(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    long = Question("What is long?", ("this",), ("this " * 1000,))
    source = Source("text", (long, *questions(20)))
    asked_for = {make_sample("qa_1", tiny_tokenizer, source, 1500, index).question for index in range(10)}
    assert len(asked_for) == 10
    assert not any("What is long?" in text for text in asked_for)


def test_errors(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="no question over several documents: give a file"):
        make_sample("qa_2", tiny_tokenizer, Source("text", tuple(questions(1))), 1000)
    with pytest.raises(ConfigError, match=r"qa_1 ends at \d+ tokens with this source: give it more"):
        make_sample("qa_1", tiny_tokenizer, Source("text", tuple(questions(3))), 5000)
