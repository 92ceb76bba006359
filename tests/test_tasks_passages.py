"""Recitation and continuation: the text is the user's own, word for word, and the answer is how it goes on."""

from __future__ import annotations

import re

import pytest
from sources import SOURCE
from transformers import PreTrainedTokenizerFast

from bench.quality.tasks import Source, make_sample
from bench.quality.tasks.metrics import decided, words_recited
from rdkv.runtime.errors import ConfigError


@pytest.mark.parametrize("index", range(4))
def test_recitation(index: int, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample("recitation", tiny_tokenizer, SOURCE, 3000, index)
    (reference,) = sample.references
    assert sample.context in SOURCE.text
    assert sample.context.count(f"{sample.opening}") >= 1
    between = sample.context.split(sample.opening, 1)[1]
    assert between.lstrip().startswith(reference)
    assert (len(sample.opening.split()), len(reference.split())) == (20, 50)
    assert sample.score(reference) == 1
    assert sample.score(" ".join(reference.split()[:25])) == 0.5


def test_recited_passages_lie_anywhere(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    samples = [make_sample("recitation", tiny_tokenizer, SOURCE, 3000, index) for index in range(12)]
    depths = [sample.context.index(sample.references[0]) / len(sample.context) for sample in samples]
    assert min(depths) < 0.3
    assert max(depths) > 0.6


def test_continuation(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample("text", tiny_tokenizer, SOURCE, 2000, 3)
    assert (sample.question, sample.opening, sample.metric) == ("", "", None)
    assert len(sample.references[0].split()) == 100
    both = re.escape(sample.context) + r"\s+" + re.escape(sample.references[0])
    assert re.search(both, SOURCE.text)
    assert not sample.finished("anything")
    with pytest.raises(AssertionError, match="no metric"):
        sample.score("anything")


def test_a_text_that_is_too_short(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="ends at"):
        make_sample("text", tiny_tokenizer, Source("word and " * 150), 3000)


def test_words_recited() -> None:
    reference = ("one two three four",)
    assert words_recited("one two three four and on", reference) == 1.0
    assert words_recited("zero one two three", reference) == 0.75
    assert words_recited("four three", reference) == 0.25
    assert words_recited("", reference) == 0.0
    assert not decided(words_recited, "one two three fo", reference)
    assert decided(words_recited, "one two three four a", reference)
