"""The words that are asked for come most often, by the counts of the text itself."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from sources import SOURCE
from transformers import PreTrainedTokenizerFast

from bench.quality.tasks import Source, make_sample


def listed(text: str) -> list[str]:
    return re.findall(r"\d+\. ([a-z-]+)", text)


@pytest.mark.parametrize(("length", "often", "seldom"), [(2500, 6, 1), (6000, 6, 1), (16000, 30, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_common_words(length: int, often: int, seldom: int, seed: int, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample("cwe", tiny_tokenizer, SOURCE, length, seed=seed)
    counts = Counter(listed(sample.context.rpartition("\n\n")[2]))
    assert {word for word, count in counts.items() if count == often} == set(sample.references)
    assert set(counts.values()) == {often, seldom}
    assert len(counts) > 20


def test_solved_example(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample("cwe", tiny_tokenizer, SOURCE, 2500)
    _, items, asked, _, _ = sample.context.split("\n\n")
    counts = Counter(listed(items))
    answer = asked.rpartition(" are ")[2].rstrip(".").split(", ")
    assert {word for word, count in counts.items() if count == 3} == set(answer)
    assert Counter(counts.values()) == {3: 10, 1: 10}
    assert not set(counts) & set(listed(sample.context.rpartition("\n\n")[2]))


def test_few_words_in_the_source(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample("cwe", tiny_tokenizer, Source("Hardly any words."), 2500)
    words = listed(sample.context)
    assert {"hardly", "words"} < set(words)
    assert sum("-" in word for word in words) > 50


@pytest.mark.parametrize("length", [900, 3000, 9000])
@pytest.mark.parametrize("seed", [0, 1])
def test_frequent_words(length: int, seed: int, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample("fwe", tiny_tokenizer, SOURCE, length, seed=seed)
    counts = Counter(sample.context.rpartition("\n\n")[2].split())
    (dots, most), *others = counts.most_common()
    assert dots == "..."
    assert tuple(word for word, _ in others[:3]) == sample.references
    first, second, third, fourth = (count for _, count in others[:4])
    assert most > first > second > third > fourth
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in others)
    # Zipf's law with exponent 2, up to what whole counts lose.
    assert all(abs(count * rank**2 - most) <= rank**2 + 1 for rank, (_, count) in enumerate(others, 2))
