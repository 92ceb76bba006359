"""Needles are whole, as many as a task has, and those that were asked for are the references."""

from __future__ import annotations

import random
import re
from collections import defaultdict

import pytest
from sources import SOURCE
from transformers import PreTrainedTokenizerFast

from bench.quality.tasks import make_sample
from bench.quality.tasks.haystack import NOISE
from bench.quality.tasks.needles import NEEDLES, distinct
from bench.quality.tasks.words import ADJECTIVES, NOUNS, compound

FOUND = re.compile(r"A secret (number|identifier) for (\S+) is (\S+)\.")
# Values and keys in the text; None where the haystack is made of needles.
SIZES = {
    "niah_single_1": 1, "niah_single_2": 1, "niah_single_3": 1, "niah_multikey_1": 4, "niah_multikey_2": None,
    "niah_multikey_3": None, "niah_multivalue": 4, "niah_multiquery": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDLES)
@pytest.mark.parametrize("length", [2000, 7000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_references_follow_from_the_text(
    name: str, length: int, seed: int, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    sample = make_sample(name, tiny_tokenizer, SOURCE, length, seed=seed)
    found: defaultdict[str, set[str]] = defaultdict(set)
    for _, key, value in FOUND.findall(sample.context):
        found[key].add(value)
    needles = sum(map(len, found.values()))
    assert needles == SIZES[name] if SIZES[name] else needles > 10
    asked = [key for key in found if key in sample.question]
    assert len(asked) == (4 if name == "niah_multiquery" else 1)
    assert set.union(*(found[key] for key in asked)) == set(sample.references)
    assert all(key in sample.opening for key in asked)


def test_values_and_keys(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    shapes = {"number": r"\d{7}", "identifier": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}
    for name in NEEDLES:
        sample = make_sample(name, tiny_tokenizer, SOURCE, 2000)
        for noun, key, value in FOUND.findall(sample.context):
            assert noun == ("identifier" if name in ("niah_single_3", "niah_multikey_3") else "number")
            assert re.fullmatch(shapes[noun], value)
            if name == "niah_multikey_3":
                assert re.fullmatch(shapes["identifier"], key)
            else:
                adjective, noun = key.split("-")
                assert (adjective in ADJECTIVES, noun in NOUNS) == (True, True)


def test_noise_haystack(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample("niah_single_1", tiny_tokenizer, SOURCE, 2000)
    text = FOUND.sub("", sample.context.split("\n\n", 1)[1])
    for sentence in NOISE:
        text = text.replace(sentence, "")
    assert text.strip() == ""


def test_text_haystack_is_not_broken(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample("niah_multikey_1", tiny_tokenizer, SOURCE, 3000)
    text = " ".join(FOUND.sub("", sample.context.split("\n\n", 1)[1]).split())
    assert text in " ".join(SOURCE.text.split())
    # Every needle stands at the beginning, or behind the end of a sentence.
    body = sample.context.split("\n\n", 1)[1]
    assert all(body[: match.start()].rstrip()[-1:] in ("", ".", "!", "?") for match in FOUND.finditer(body))


def test_needles_lie_anywhere(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    depths = []
    for index in range(20):
        sample = make_sample("niah_single_2", tiny_tokenizer, SOURCE, 2000, index)
        depths.append(sample.context.index(sample.references[0]) / len(sample.context))
    assert min(depths) < 0.3
    assert max(depths) > 0.7


def test_distinct() -> None:
    drawn = distinct(lambda draw: str(draw.randrange(10)), random.Random(0), 8, {"3", "4"})
    assert sorted(drawn) == ["0", "1", "2", "5", "6", "7", "8", "9"]


def test_words() -> None:
    assert len(set(ADJECTIVES)) == len(ADJECTIVES)
    assert len(set(NOUNS)) == len(NOUNS)
    assert re.fullmatch(r"[a-z]+-[a-z]+", compound(random.Random(0)))
