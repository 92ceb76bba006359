"""An answer's text as tokens come: characters of several tokens, stop texts across tokens, what ends it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rdkv.runtime.engine.answer import Answer
from rdkv.runtime.engine.sampling import Sampling

END = frozenset({2})


def answer(tokenizer: Any, **changes: Any) -> Answer:
    return Answer(Sampling(**({"max_new_tokens": 100} | changes)), END, tokenizer)


def feed(grown: Answer, tokens: list[int]) -> list[str]:
    pieces = []
    for token in tokens:
        assert grown.finish is None
        pieces.append(grown.take(token))
        if grown.finish is not None:
            break
    return pieces


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text).input_ids
    return found


def test_a_character_comes_when_it_is_whole(tiny_tokenizer: Any) -> None:
    grown = answer(tiny_tokenizer)
    assert feed(grown, ids(tiny_tokenizer, "a€b")) == ["a", "", "", "€", "b"]
    assert grown.text == "a€b"


def test_half_a_character_at_the_end_is_shown(tiny_tokenizer: Any) -> None:
    tokens = ids(tiny_tokenizer, "a€")[:3]
    assert feed(answer(tiny_tokenizer, max_new_tokens=3), tokens) == ["a", "", "\ufffd"]
    assert feed(answer(tiny_tokenizer), [*tokens, 2]) == ["a", "", "", "\ufffd"]


def test_stop_texts_are_held_back_and_left_out(tiny_tokenizer: Any) -> None:
    grown = answer(tiny_tokenizer, stop=("end!", "nothing"))
    assert feed(grown, ids(tiny_tokenizer, "an end. en end! more")) == [
        "a", "", "n ", "", "", "", "end.", " ", "", "", "en ", "", "", "", "",
    ]  # fmt: skip
    assert (grown.text, grown.finish) == ("an end. en ", "stop")
    assert grown.completion.tokens == tuple(ids(tiny_tokenizer, "an end. en end!"))


def test_what_was_held_back_comes_with_the_last_token(tiny_tokenizer: Any) -> None:
    grown = answer(tiny_tokenizer, stop=("end!",), max_new_tokens=3)
    assert feed(grown, ids(tiny_tokenizer, "end")) == ["", "", "end"]
    assert grown.finish == "length"
    assert feed(answer(tiny_tokenizer, stop=("end!",)), [*ids(tiny_tokenizer, "en"), 2]) == ["", "", "en"]


def test_a_stop_text_in_the_last_token_counts(tiny_tokenizer: Any) -> None:
    grown = answer(tiny_tokenizer, stop=("d",), max_new_tokens=3)
    feed(grown, ids(tiny_tokenizer, "end"))
    assert (grown.text, grown.finish) == ("en", "stop")


@pytest.mark.parametrize(
    ("changes", "count", "finish"),
    [
        ({}, 3, "stop"),
        ({"ignore_eos": True}, 5, "length"),
        ({"stop_token_ids": (100,)}, 2, "stop"),
        ({"stop_token_ids": (101,), "ignore_eos": True}, 4, "stop"),
        ({"max_new_tokens": 2}, 2, "length"),
    ],
)
def test_what_ends_it(changes: dict[str, Any], count: int, finish: str, tiny_tokenizer: Any) -> None:
    for tokenizer in (None, tiny_tokenizer):
        grown = answer(tokenizer, **({"max_new_tokens": 5} | changes))
        feed(grown, [99, 100, 2, 101, 102])
        assert (len(grown.tokens), grown.finish) == (count, finish)
        assert bool(grown.text) == (tokenizer is not None)


@given(text=st.text(max_size=12), stops=st.lists(st.text(min_size=1, max_size=3), max_size=3))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_are_the_text_up_to_the_first_stop(text: str, stops: list[str], tiny_tokenizer: Any) -> None:
    tokens = ids(tiny_tokenizer, text)
    grown = answer(tiny_tokenizer, stop=tuple(stops))
    pieces = feed(grown, [*tokens, 2])
    assert "".join(pieces) == grown.text
    whole = tiny_tokenizer.decode(tokens)
    found = [whole.find(stop) for stop in stops if stop in whole]
    assert grown.finish == "stop"
    if not found:
        assert grown.text == whole
    else:  # the stop that was complete first may begin later than another
        assert grown.text in {whole[:at] for at in found} | {whole[: min(found)]}
