"""The pass key and the value of a key are where a reader would find them."""

from __future__ import annotations

import json
import re

import pytest
from sources import SOURCE
from transformers import PreTrainedTokenizerFast

from bench.quality.tasks import make_sample


@pytest.mark.parametrize("length", [1000, 5000])
@pytest.mark.parametrize("seed", [0, 1])
def test_passkey(length: int, seed: int, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample("passkey_retrieval", tiny_tokenizer, SOURCE, length, seed=seed)
    assert re.findall(r"\d+", sample.context) == [*sample.references] * 2
    assert re.fullmatch(r"\d{5}", sample.answer)


@pytest.mark.parametrize("length", [1000, 5000])
@pytest.mark.parametrize("seed", [0, 1])
def test_key_value(length: int, seed: int, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample("kv_retrieval", tiny_tokenizer, SOURCE, length, seed=seed)
    pairs = json.loads(sample.context.partition("\n\n")[2])
    (key,) = re.findall(r'"(.+)"', sample.question)
    assert (pairs[key],) == sample.references
    assert len(pairs) == sample.context.count(":") - sample.context.partition("\n\n")[0].count(":")
    assert len(set(pairs.values())) == len(pairs) > 5
