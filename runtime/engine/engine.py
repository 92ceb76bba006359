"""`Engine`: prompts in, answers out, each decoded from its compressed cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache import CompressedCache
from ..config import CompressionConfig
from ..errors import ConfigError
from ..loading import load_model
from ..prompt import check_window, encode
from ..support import text_config
from .answer import Answer, Completion, Piece, end_tokens
from .batch import Batch
from .blocks import TailBlock, block_size
from .fused import forward_of
from .runner import Runner
from .sampling import Sampling

Prompt = str | Sequence[int]


@dataclass(frozen=True, eq=False)
class CompressedPrompt:
    """A prompt that was read and compressed once, to be continued any number of times.

    Attributes:
        cache: holds the prompt and nothing after it; continuing works on forks (`CompressedCache.fork`).
        logits: ``[V]``, after its last token; None if they are not known, and then only a continuation that has
            tokens of its own is possible.
    """

    cache: CompressedCache
    logits: Tensor | None

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return self.cache.prompt_lengths[0]


class Engine:
    """Generation for batches of prompts with compressed caches.

    Every prompt is read and compressed on its own, so neither the others nor padding matter to it; then all
    sequences decode together. The model stays usable by itself: products that read the same input are fused, its
    weights becoming views. One whose layers are not known (`known_decoder`) is attached (`attach`) instead, and
    takes transformers' memory and time.

    Args:
        model: a transformers causal language model.
        compression: what compresses each prompt, and the budget.
        tokenizer: for prompts and stop texts that are text, and the text of answers.
        tail_block: for long answers: whenever every sequence has twice as many tokens after its prompt, compress so
            many of the oldest, with the same settings. ``auto`` is `TAIL_BLOCK` where ``compression.budget`` is set and
            below 1, and None otherwise, which keeps all of them at 16 bits.

    Raises:
        UnsupportedModelError: the model cannot use a compressed cache.
        ConfigError, PluginError: the configuration names or sets something that is not there.
    """

    def __init__(
        self,
        model: Any,
        compression: CompressionConfig,
        tokenizer: Any | None = None,
        *,
        tail_block: TailBlock = "auto",
    ) -> None:
        CompressedCache(model.config, compression)  # refuses early
        self.tail_block = block_size(tail_block, compression)
        self.model, self.compression, self.tokenizer = model, compression, tokenizer
        self.forward = forward_of(model)

    @classmethod
    def load(
        cls,
        name: str,
        compression: CompressionConfig,
        device: str = "auto",
        dtype: str = "auto",
        *,
        tail_block: TailBlock = "auto",
    ) -> Engine:
        """An engine for the model called ``name``; other arguments and errors as of `load_model`."""
        loaded = load_model(name, device, dtype, lambda config: CompressedCache(config, compression))
        return cls(loaded.model, compression, loaded.tokenizer, tail_block=tail_block)

    @torch.inference_mode()
    def compress(self, prompt: Prompt) -> CompressedPrompt:
        """Read and compress a prompt.

        Raises:
            ConfigError: a prompt that is empty or does not fit the model's window.
        """
        ids = self._ids(prompt)
        if not ids:
            raise ConfigError("the prompt is empty")
        check_window(len(ids), 0, self.model.config)
        cache = CompressedCache(self.model.config, self.compression)
        logits = self._read(ids, cache)
        return CompressedPrompt(cache, logits)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        after: CompressedPrompt | Sequence[CompressedPrompt] | None = None,
    ) -> list[Completion]:
        """Answers to a batch of prompts; arguments and errors as of `stream`."""
        answers, runner = self._start(prompts, sampling, after)
        for _ in _pieces(answers, runner):
            pass
        return [answer.completion for answer in answers]

    def stream(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        after: CompressedPrompt | Sequence[CompressedPrompt] | None = None,
    ) -> Iterator[Piece]:
        """Answers to a batch of prompts, piece by piece as they come.

        Args:
            prompts: texts or token ids, of any lengths.
            sampling: for all of them, or one for each; greedy if None.
            after: what was read before the prompts, one for all or one for each: a prompt is then a continuation,
                such as a question about a document. It joins the sequence at 16 bits, and may be empty.

        Raises:
            ConfigError: an empty prompt, one that with its answer does not fit the model's window, lists of unlike
                lengths, or text without a tokenizer.
        """
        return _pieces(*self._start(prompts, sampling, after))

    @torch.inference_mode()
    def _start(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None,
        after: CompressedPrompt | Sequence[CompressedPrompt] | None,
    ) -> tuple[list[Answer], Runner]:
        """Read all prompts; the first tokens are chosen."""
        if isinstance(prompts, str) or not prompts:
            raise ConfigError("prompts is a list of texts or of lists of token ids, with at least one")
        samplings = _for_each(sampling or Sampling(), len(prompts), "sampling")
        bases = _for_each(after, len(prompts), "after")
        every = [self._ids(prompt, special=base is None) for prompt, base in zip(prompts, bases, strict=True)]
        for ids, base, settings in zip(every, bases, samplings, strict=True):
            self._check(ids, base, settings)
        caches, logits = zip(*(self._sequence(i, base) for i, base in zip(every, bases, strict=True)), strict=True)
        ends = end_tokens(self.model)
        answers = [Answer(settings, ends, self.tokenizer) for settings in samplings]
        return answers, Runner(self.forward, Batch(caches, self.tail_block), torch.stack(logits), samplings)

    def _sequence(self, ids: tuple[int, ...], base: CompressedPrompt | None) -> tuple[CompressedCache, Tensor]:
        """A sequence up to its answer: its cache, and logits ``[V]`` of its last position."""
        if base is None:
            prompt = self.compress(ids)
            assert prompt.logits is not None
            return prompt.cache, prompt.logits
        if not ids:
            assert base.logits is not None
            return base.cache, base.logits
        cache = base.cache.fork()
        return cache, self._read(ids, cache)

    def _read(self, ids: tuple[int, ...], cache: CompressedCache) -> Tensor:
        return self.forward.read(torch.tensor([ids], device=self.model.device), cache)

    def _ids(self, prompt: Prompt, special: bool = True) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return self._checked(tuple(int(token) for token in prompt))
        if self.tokenizer is None:
            raise ConfigError("the engine has no tokenizer; give prompts as token ids")
        return encode(self.tokenizer, prompt, special)

    def _checked(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Ids that the model knows; a GPU would not survive others."""
        most = text_config(self.model.config).vocab_size
        if wrong := [token for token in ids if not 0 <= token < most]:
            raise ConfigError(f"token id {wrong[0]} is not one of the model's {most}")
        return ids

    def _check(self, ids: tuple[int, ...], base: CompressedPrompt | None, sampling: Sampling) -> None:
        if not ids and (base is None or base.logits is None):
            raise ConfigError("a prompt is empty")
        if sampling.stop and self.tokenizer is None:
            raise ConfigError("the engine has no tokenizer, which stop texts need; use stop_token_ids")
        read = base.tokens if base is not None else 0
        check_window(read + len(ids), sampling.max_new_tokens, self.model.config)


def _for_each(given: Any, count: int, name: str) -> list[Any]:
    """A list of ``count``, of one for all or of one for each."""
    if not isinstance(given, (list, tuple)):
        return [given] * count
    if len(given) != count:
        raise ConfigError(f"{name} has {len(given)} entries for {count} prompts; give one for all or one for each")
    return list(given)


def _pieces(answers: list[Answer], runner: Runner) -> Iterator[Piece]:
    """Decode until every answer has ended; sequences that have are computed on, and nobody looks."""
    while True:
        for index, (answer, token) in enumerate(zip(answers, runner.tokens.tolist(), strict=True)):
            if answer.finish is None:
                text = answer.take(token)
                yield Piece(index=index, token=token, text=text, finish=answer.finish)
        if all(answer.finish for answer in answers):
            return
        runner.step()
