"""From text and question to the tokens of one prompt, and where the question begins in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import ConfigError
from .support import model_window

SEPARATOR = "\n\n"  # between the text and the question
UNKNOWN = "unknown"  # in place of a text or a question that is not known yet; any word would do


@dataclass(frozen=True)
class Prompt:
    """Token ids of the text and of what follows it as a later turn (empty unless compressing first)."""

    text: tuple[int, ...]
    turn: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """How many tokens the model reads before it writes."""
        return len(self.text) + len(self.turn)


def build_prompt(
    tokenizer: Any, text: str, question: str | None = None, chat: bool = False, compress_first: bool = False
) -> Prompt:
    """Tokenise a prompt.

    Args:
        tokenizer: a transformers tokenizer.
        text: what the cache is made of.
        question: appended to the text after an empty line.
        chat: wrap both as one user message in the tokenizer's chat template.
        compress_first: keep the question (and what the template puts after it) apart, as a later turn.

    Raises:
        ConfigError: no text, a question that has to come later but is missing, or no chat template.
    """
    if compress_first:
        if question is None:
            raise ConfigError("compress_first keeps the question for a later turn, but there is no question")
        return Prompt(document(tokenizer, text, chat), turn(tokenizer, question, chat))
    _check(text, question)
    whole = text if question is None else text + SEPARATOR + question
    return Prompt(encode(tokenizer, _render(tokenizer, whole) if chat else whole, special=not chat))


def document(tokenizer: Any, text: str, chat: bool = False) -> tuple[int, ...]:
    """Tokens of a text that questions will follow (`turn`), which are not known yet.

    Raises:
        ConfigError: no text, or a chat template that is missing or cannot be cut after it.
    """
    _check(text, None)
    head, _ = _cut(tokenizer, text, UNKNOWN, chat)
    return encode(tokenizer, head, special=not chat)


def turn(tokenizer: Any, question: str, chat: bool = False) -> tuple[int, ...]:
    """Tokens of a question that follows a `document`, and of what the chat template puts after it.

    Raises:
        ConfigError: no question, or a chat template that is missing or cannot be cut before it.
    """
    _check(UNKNOWN, question)
    _, tail = _cut(tokenizer, UNKNOWN, question, chat)
    return encode(tokenizer, tail, special=False)


def _check(text: str, question: str | None) -> None:
    if not text.strip():
        raise ConfigError("the prompt is empty")
    if question is not None and not question.strip():
        raise ConfigError("the question is empty")


def _cut(tokenizer: Any, text: str, question: str, chat: bool) -> tuple[str, str]:
    """A text with its question, rendered, before and after the place where the question begins."""
    whole = text + SEPARATOR + question
    rendered = _render(tokenizer, whole) if chat else whole
    # The last occurrence: the text may contain the question's words too, but the question comes after it.
    cut = rendered.rfind(SEPARATOR + question)
    if cut < 0:
        raise ConfigError("the chat template changes the question, so it cannot be told apart for a later turn")
    return rendered[:cut], rendered[cut:]


def check_window(tokens: int, new_tokens: int, config: Any) -> None:
    """Refuse a prompt of ``tokens`` tokens that, with its answer, does not fit the model's window.

    Raises:
        ConfigError: with the numbers that do not fit.
    """
    window = model_window(config)
    if window is None:
        return
    if tokens > window:
        raise ConfigError(f"the prompt has {tokens} tokens, but the model's window is {window}")
    if tokens + new_tokens > window:
        raise ConfigError(
            f"the prompt has {tokens} tokens, which with {new_tokens} new ones passes the model's window "
            f"of {window}; ask for at most {window - tokens} new tokens"
            if tokens < window
            else f"the prompt has {tokens} tokens and fills the model's window; no new token fits"
        )


def _render(tokenizer: Any, content: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("chat: this model's tokenizer has no chat template")
    message = [{"role": "user", "content": content}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def encode(tokenizer: Any, text: str, special: bool) -> tuple[int, ...]:
    """Token ids of a text that goes on; ``special``: with what the tokenizer puts before a text."""
    ids = tuple(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)
    if special and tokenizer.eos_token_id is not None and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers close a text; a prompt goes on
    return ids
