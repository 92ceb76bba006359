"""Prompts: where the question goes, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from rdkv.runtime.errors import ConfigError
from rdkv.runtime.prompt import Prompt, build_prompt, check_window, document, turn


def text_of(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids)))


def test_question_follows_the_text(tiny_tokenizer: Any) -> None:
    prompt = build_prompt(tiny_tokenizer, "text", "why?")
    assert text_of(tiny_tokenizer, prompt.text) == "text\n\nwhy?"
    assert prompt.turn == ()


def test_compress_first_keeps_the_question_apart(tiny_tokenizer: Any) -> None:
    prompt = build_prompt(tiny_tokenizer, "why? Because. why?", "why?", compress_first=True)
    assert text_of(tiny_tokenizer, prompt.text) == "why? Because. why?"
    assert text_of(tiny_tokenizer, prompt.turn) == "\n\nwhy?"
    assert prompt.tokens == len(prompt.text) + len(prompt.turn)


def test_chat_wraps_text_and_question(tiny_tokenizer: Any) -> None:
    whole = build_prompt(tiny_tokenizer, "text", "why?", chat=True)
    assert text_of(tiny_tokenizer, whole.text) == "<s>user: text\n\nwhy?</s><s>assistant: "
    split = build_prompt(tiny_tokenizer, "text", "why?", chat=True, compress_first=True)
    assert text_of(tiny_tokenizer, split.text) == "<s>user: text"
    assert text_of(tiny_tokenizer, split.turn) == "\n\nwhy?</s><s>assistant: "


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("text", ["text", " unknown \n", "a\n\nwhy?\n\n"])
def test_a_document_and_a_later_turn_make_the_prompt(tiny_tokenizer: Any, text: str, chat: bool) -> None:
    whole = build_prompt(tiny_tokenizer, text, "why?", chat)
    head, tail = document(tiny_tokenizer, text, chat), turn(tiny_tokenizer, "why?", chat)
    assert text_of(tiny_tokenizer, head + tail) == text_of(tiny_tokenizer, whole.text)
    assert Prompt(head, tail) == build_prompt(tiny_tokenizer, text, "why?", chat, compress_first=True)


def test_a_template_that_strips_what_it_is_given(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "[{{ messages[0]['content'] | trim }}]")
    assert text_of(tiny_tokenizer, document(tiny_tokenizer, " text \n", chat=True)) == "[text \n"
    assert text_of(tiny_tokenizer, turn(tiny_tokenizer, "why?", chat=True)) == "\n\nwhy?]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"text": ""}, "the prompt is empty"),
        ({"text": " \n\t"}, "the prompt is empty"),
        ({"text": "a", "question": " "}, "the question is empty"),
        ({"text": "a", "compress_first": True}, "there is no question"),
    ],
)
def test_bad_prompts(tiny_tokenizer: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_prompt(tiny_tokenizer, **arguments)


def test_chat_without_a_template(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="no chat template"):
        build_prompt(tiny_tokenizer, "a", chat=True)


def test_chat_template_that_rewrites_the_question(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ messages[0]['content'] | upper }}")
    with pytest.raises(ConfigError, match="changes the question"):
        build_prompt(tiny_tokenizer, "a", "why?", chat=True, compress_first=True)


@pytest.mark.parametrize(
    ("tokens", "new", "words"),
    [
        (11, 1, "the prompt has 11 tokens, but the model's window is 10"),
        (10, 1, "no new token fits"),
        (8, 3, "at most 2 new tokens"),
        (8, 2, None),
    ],
)
def test_window(tokens: int, new: int, words: str | None) -> None:
    config = LlamaConfig(max_position_embeddings=10)
    prompt = Prompt((1,) * (tokens - 1), (1,))
    if words is None:
        check_window(prompt.tokens, new, config)
        return
    with pytest.raises(ConfigError, match=words):
        check_window(prompt.tokens, new, config)
