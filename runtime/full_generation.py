"""Generation by transformers' own ``generate`` with its own cache, for comparison; timed."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache

from .engine.answer import Answer, end_tokens
from .engine.sampling import Sampling
from .loading import LoadedModel
from .prompt import Prompt


def now(device: str) -> float:
    """Time with the device idle."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def generate_full(loaded: LoadedModel, sampling: Sampling, prompt: Prompt, cache: Cache) -> tuple[Answer, float, float]:
    """The answer, seconds until its first token could be chosen, seconds from there on."""
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    clock = _FirstToken(loaded.device)
    start = now(loaded.device)
    if prompt.turn:
        loaded.read(prompt.text, cache)
    ids = torch.tensor([prompt.text + prompt.turn], device=loaded.device)
    ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else end_tokens(loaded.model))
    output = loaded.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=sampling.max_new_tokens,
        logits_processor=LogitsProcessorList([clock]),
        pad_token_id=_pad_token(loaded),
        eos_token_id=sorted(ends) or None,
        **_sampling(sampling),
        **({"stop_strings": list(sampling.stop), "tokenizer": loaded.tokenizer} if sampling.stop else {}),
    )
    end = now(loaded.device)
    first = clock.at if clock.at is not None else end
    answer = Answer(sampling, end_tokens(loaded.model), loaded.tokenizer)
    for token in output[0, ids.shape[1] :].tolist():
        if answer.finish is None:
            answer.take(token)
    return answer, first - start, end - first


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """Settings of transformers' ``generate``; every one is given, for a checkpoint may bring its own."""
    if sampling.temperature == 0:
        return {"do_sample": False, "num_beams": 1}
    return {
        "do_sample": True,
        "num_beams": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or None,
    }


def _pad_token(loaded: LoadedModel) -> int | None:
    generation = loaded.model.generation_config
    if generation.pad_token_id is not None:
        return int(generation.pad_token_id)
    eos: int | list[int] | None = generation.eos_token_id
    return eos[0] if isinstance(eos, list) else eos


class _FirstToken(LogitsProcessor):
    """Notes when the first logits arrive, which is when the prompt has been read; changes nothing."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.at is None:
            self.at = now(self.device)
        return scores
