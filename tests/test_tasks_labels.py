"""Few-shot labels: every label is shown, the answer follows from the examples alone."""

from __future__ import annotations

import re

import pytest
from sources import SOURCE
from transformers import PreTrainedTokenizerFast

from bench.quality.tasks import make_sample
from bench.quality.tasks.labels import NAMES, REQUESTS, SLOTS
from bench.quality.tasks.metrics import decided, line_match


def kind_of(request: str) -> str:
    """The kind of a request, by its templates."""
    slots = {name: f"(?:{'|'.join(map(re.escape, words))})" for name, words in SLOTS.items()}
    for kind, templates in REQUESTS.items():
        for template in templates:
            pattern = re.sub(r"\\{(\w+)\\}", lambda found: slots[found[1]], re.escape(template))
            if re.fullmatch(pattern, request):
                return kind
    raise AssertionError(request)


@pytest.mark.parametrize("index", range(6))
def test_the_examples_tell_the_label(index: int, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = make_sample("labels", tiny_tokenizer, SOURCE, 3000, index)
    shown = re.findall(r"^Request: (.*)\nLabel: (\w+)$", sample.context, re.MULTILINE)
    named = {kind_of(request): label for request, label in shown}
    assert set(named) == set(REQUESTS)
    assert len(set(named.values())) == len(REQUESTS)
    assert all(named[kind_of(request)] == label for request, label in shown)
    assert sample.references == (named[kind_of(sample.question.removeprefix("Request: "))],)


def test_labels_mean_nothing(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    samples = [make_sample("labels", tiny_tokenizer, SOURCE, 2000, index) for index in range(20)]
    answers = {sample.references[0] for sample in samples}
    assert answers < set(NAMES)
    assert len(answers) > 5


def test_line_match() -> None:
    assert line_match(" Amber\nRequest", ["amber"]) == 1.0
    assert line_match("\nflint", ["flint"]) == 1.0
    assert line_match("flint grove", ["flint"]) == line_match("", ["flint"]) == 0.0
    assert decided(line_match, "flint\n", ["flint"])
    assert not decided(line_match, "\nflint", ["flint"])
