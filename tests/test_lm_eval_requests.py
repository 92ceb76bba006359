"""Requests for log-likelihoods are grouped by context, and cut where a model's window ends."""

from __future__ import annotations

import pytest

from rdkv.plugins.lm_eval.requests import batches, contexts


def test_a_context_is_there_once_with_all_its_continuations() -> None:
    found = contexts([([1, 2], [7]), ([1, 2, 3], [8, 9]), ([1, 2], [7, 7]), ([1, 2], [7])], longest=10)
    assert [(c.tokens, c.continuations) for c in found] == [
        ((1, 2, 3), [(1, [8, 9])]),
        ((1, 2), [(0, [7]), (2, [7, 7]), (3, [7])]),
    ]


def test_a_context_loses_its_beginning() -> None:
    """The last token of a continuation is predicted and not read, so that one token more fits."""
    (found,) = contexts([([1, 2, 3, 4], [5, 6])], longest=4)
    assert found.tokens == (2, 3, 4)
    (short,) = contexts([([1, 2, 3, 4], [5, 6, 7, 8])], longest=4)
    assert short.tokens == (4,)


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [2, 3, 4, 5, 6])])
def test_what_cannot_be_scored_is_refused(pair: tuple[list[int], list[int]]) -> None:
    with pytest.raises(ValueError, match="the model takes 4"):
        contexts([pair], longest=4)


def test_batches() -> None:
    found = contexts([([n], [1]) for n in range(5)], longest=4)
    assert [len(batch) for batch in batches(found, 2)] == [2, 2, 1]
