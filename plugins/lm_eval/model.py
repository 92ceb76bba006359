"""`RdkvLM`: lm-evaluation-harness's Hugging Face model, with each context's cache compressed.

A context is read and compressed; continuations are scored, and answers generated, on what is left of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

import rdkv
from rdkv.runtime.cli_options import COMPRESSION_FLAGS
from rdkv.runtime.config import CompressionConfig
from rdkv.runtime.errors import ConfigError, UnsupportedModelError
from rdkv.runtime.loading import resolve_source
from rdkv.runtime.settings import compression_config, read_settings

from .requests import Context, batches, contexts


@register_model("rdkv")
class RdkvLM(HFLM):  # type: ignore[misc]
    """A causal language model that sees every context through a compressed cache.

    Args:
        pretrained: as for ``hf``, or what ``rdkv`` takes as ``--model`` (a GGUF file, ``smollm2-135m``); or a model.
        config: a TOML file with any flags of ``rdkv generate``; those given here win.
        question_tokens: so many of the last tokens of every context come after its compression. With 0 the first
            token of a continuation or an answer has the logits of the pass over the context, which no compression
            changes; so choices of one token want 1 at least.
        more: the compression, by the names of ``rdkv generate``'s flags (``budget``, ``scorer``, ``preset``,
            ``scorer_options`` ...; attention's backend is ``attention_backend``), and what ``hf`` takes.

    Raises:
        ConfigError, PluginError: the configuration names or sets something that is not there.
        UnsupportedModelError: the model cannot use a compressed cache.
    """

    def __init__(self, pretrained: Any, config: str | None = None, question_tokens: int = 0, **more: Any) -> None:
        if question_tokens < 0:
            raise ConfigError(f"question_tokens is {question_tokens}; it is a number of tokens, 0 or more")
        self.question_tokens = question_tokens
        self.compression = _compression(more, config)
        super().__init__(resolve_source(pretrained) if isinstance(pretrained, str) else pretrained, **more)
        if self.backend != "causal":
            raise UnsupportedModelError("rdkv compresses caches of decoder-only models; this one has an encoder")
        rdkv.attach(self.model)
        self._held = self._full = 0
        self._new_cache()  # refuses early

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Refused: a text's own log-likelihood has no context that could be compressed."""
        raise ConfigError(
            "tasks of this kind (loglikelihood_rolling: perplexity of a text) have no context to compress; "
            "run them with --model hf"
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model, and the compression and the share of bytes that it kept."""
        info: dict[str, Any] = super().get_model_info()
        kept = {"rdkv_retention": self._held / self._full} if self._full else {}
        return {**info, **{f"rdkv_{name}": value for name, value in self.compression.choices.items()}, **kept}

    def _new_cache(self) -> rdkv.CompressedCache:
        return rdkv.CompressedCache(self.model.config, self.compression)

    def _count(self, cache: rdkv.CompressedCache) -> None:
        self._held += cache.prompt_nbytes
        self._full += cache.prompt_full_nbytes

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor, **more: Any
    ) -> Tensor:
        """As of ``hf``: ``[B, T]`` padded on the left, with what follows."""
        cache = self._new_cache()
        if after := min(self.question_tokens, int(attention_mask.sum(1).min()) - 1):
            with torch.no_grad():
                self._read(context[:, :-after], cache, attention_mask[:, :-after])
        more |= {"attention_mask": attention_mask, "past_key_values": cache}
        answer: Tensor = super()._model_generate(context, max_length, stop, **more)
        self._count(cache)
        return answer

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Each continuation's log-likelihood, and whether it is what greedy decoding gives."""
        size = override_bs or (self._detect_batch_size() if self.batch_size == "auto" else self.batch_size)
        ordered = contexts([(context, continuation) for _, context, continuation in requests], self.max_length)
        answers: dict[int, tuple[float, bool]] = {}
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=hidden, desc="Running loglikelihood requests") as bar:
            for batch in batches(ordered, int(size)):
                for index, answer in self._score(batch):
                    answers[index] = answer
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                    bar.update(1)
        return [answers[index] for index in range(len(requests))]

    @torch.no_grad()
    def _score(self, batch: Sequence[Context]) -> list[tuple[int, tuple[float, bool]]]:
        """Read a batch of contexts, then their first continuations, their second ones, and so on."""
        after = [min(self.question_tokens, len(context.tokens) - 1) for context in batch]
        rows = [list(context.tokens[: len(context.tokens) - n]) for context, n in zip(batch, after, strict=True)]
        width = max(map(len, rows))
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = (torch.arange(width, device=self.device) >= width - lengths[:, None]).long()  # [B, T]
        cache = self._new_cache()
        first = self._read(self._tokens([[0] * (width - len(row)) + row for row in rows]), cache, mask)  # [B, 1, V]
        self._count(cache)
        scored: list[tuple[int, tuple[float, bool]]] = []
        for turn in range(max(len(context.continuations) for context in batch)):
            asked = [context.continuations[turn] if turn < len(context.continuations) else None for context in batch]
            logits = torch.cat([first, *self._continue(cache, mask, batch, after, asked)], 1)
            for row, begin, pair in zip(logits, after, asked, strict=True):
                if pair is not None:
                    scored.append((pair[0], self._answer(row[begin:], pair[1])))
        return scored

    def _continue(
        self, cache: Any, mask: Tensor, batch: Sequence[Context], after: list[int], asked: Sequence[Any]
    ) -> list[Tensor]:
        """Logits ``[B, n, V]`` of what follows each compressed context, in a cache of its own; none for no tokens."""
        rows = [
            [*context.tokens[len(context.tokens) - n :], *pair[1][:-1]] if pair is not None else []
            for context, n, pair in zip(batch, after, asked, strict=True)
        ]
        longest = max(map(len, rows))
        if not longest:
            return []
        # Padded on the right: later tokens change nothing for earlier ones.
        ids = self._tokens([row + [0] * (longest - len(row)) for row in rows])
        positions = torch.arange(longest, device=self.device) + mask.sum(1, keepdim=True)
        whole = torch.cat([mask, mask.new_ones(len(rows), longest)], 1)
        return [self._logits(ids, cache.fork(), whole, positions)]

    def _read(self, ids: Tensor, cache: Any, mask: Tensor) -> Tensor:
        """Prefill with prompts padded on the left; logits ``[B, 1, V]``."""
        return self._logits(ids, cache, mask, (mask.cumsum(1) - 1).clamp(min=0), logits_to_keep=1)

    def _answer(self, logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
        """From logits ``[n or more, V]`` of a continuation of ``n`` tokens."""
        tokens = torch.tensor(continuation, device=logits.device)
        likelihoods = logits[: len(tokens)].log_softmax(-1, dtype=self.softmax_dtype)
        chosen = likelihoods.gather(1, tokens[:, None])
        return float(chosen.sum()), bool((likelihoods.argmax(-1) == tokens).all())

    def _logits(self, ids: Tensor, cache: Any, mask: Tensor, positions: Tensor, **more: Any) -> Tensor:
        """``[B, n, V]``."""
        dtype = self.mixed_precision_dtype
        with torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None):
            logits: Tensor = self.model(
                ids, past_key_values=cache, attention_mask=mask, position_ids=positions, use_cache=True, **more
            ).logits
        return logits

    def _tokens(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self.device)


def _compression(arguments: dict[str, Any], config: str | None) -> CompressionConfig:
    """What compresses, of ``arguments``, from which it is taken out, over a TOML file."""
    given = {name: arguments.pop(name) for name in (*COMPRESSION_FLAGS, "plugins") if name in arguments}
    if "calibration" in given and given["calibration"] is None:
        given["calibration"] = "none"  # lm-evaluation-harness reads the word as None
    if isinstance(given.get("plugins"), str):
        given["plugins"] = (given["plugins"],)
    given["backend"] = arguments.pop("attention_backend", None)
    return compression_config(read_settings(given, config))
