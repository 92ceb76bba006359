"""A chain of variables resolves to its number; so does that of the solved example."""

from __future__ import annotations

import re

import pytest
from sources import SOURCE
from transformers import PreTrainedTokenizerFast

from bench.quality.tasks import make_sample


def holders(text: str, value: str) -> list[str]:
    """Variables that hold a value, by running the assignments in the order of the text."""
    values: dict[str, str] = {}
    for target, source in re.findall(r"LET ([A-Z]+) = (\w+)\.", text):
        values[target] = values.get(source, source)
    return [name for name, held in values.items() if held == value]


@pytest.mark.parametrize("length", [2000, 6000])
@pytest.mark.parametrize("seed", range(4))
def test_chain_resolves(length: int, seed: int, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample("vt", tiny_tokenizer, SOURCE, length, seed=seed)
    (value,) = re.findall(r"\d{5}", sample.question)
    assert value in sample.opening
    assert holders(sample.context, value) == list(sample.references)
    assert len(re.findall("LET", sample.context)) == 10


def test_example_is_solved(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample("vt", tiny_tokenizer, SOURCE, 3000)
    value, answer = re.findall(r"variables that hold (\d+) are ([A-Z, ]+)\.", sample.context)[0]
    assert holders(sample.context, value) == answer.split(", ")
    assert value not in sample.question
    assert not set(answer.split(", ")) & set(sample.references)
