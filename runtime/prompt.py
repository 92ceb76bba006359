"""From text and question to the tokens of one prompt, and where the question begins in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import ConfigError
from .support import model_window

SEPARATOR = "\n\n"  # between the text and the question


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
    if not text.strip():
        raise ConfigError("the prompt is empty")
    if question is not None and not question.strip():
        raise ConfigError("the question is empty")
    if compress_first and question is None:
        raise ConfigError("compress_first keeps the question for a later turn, but there is no question")
    whole = text if question is None else text + SEPARATOR + question
    rendered = _render(tokenizer, whole) if chat else whole
    if not (compress_first and question is not None):
        return Prompt(encode(tokenizer, rendered, special=not chat))
    # The last occurrence: the text may contain the question's words too, but the question comes after it.
    cut = rendered.rfind(SEPARATOR + question)
    if cut < 0:
        raise ConfigError("the chat template changes the question, so it cannot be told apart for a later turn")
    head = encode(tokenizer, rendered[:cut], special=not chat)
    return Prompt(head, encode(tokenizer, rendered[cut:], special=False))


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
