"""One measured run: a prompt is read, its cache compressed, and an answer decoded from the packed form."""

from __future__ import annotations

import math
import time
from typing import Any

import msgspec
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from .cache import CompressedCache
from .config import CompressionConfig
from .errors import ConfigError
from .loading import LoadedModel
from .prompt import Prompt, build_prompt, check_window


class GenerationRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to ask of a model.

    Attributes:
        prompt: the text whose cache is compressed.
        question: appended to the prompt, see `build_prompt`.
        chat: use the tokenizer's chat template.
        compress_first: compress the text before the question is seen.
        max_new_tokens: at most this many tokens are generated.
        temperature: 0 takes the likeliest token each time, above 0 samples.
        top_p: sample from the likeliest tokens that hold this share of the probability.
        seed: of the random numbers that sampling draws.

    Raises:
        ConfigError: a value out of range.
    """

    prompt: str
    question: str | None = None
    chat: bool = False
    compress_first: bool = False
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_p < 1 and self.temperature == 0:
            raise ConfigError("top_p has no effect without sampling; set a temperature above 0")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be a whole number from 0 to 2**63 - 1")


class Seconds(msgspec.Struct, frozen=True):
    """Wall-clock time of each phase, in seconds; ``prefill`` does not include ``compress``."""

    prefill: float
    compress: float
    decode: float


class GenerationReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a run gave, and what it took; ``rdkv generate --json`` prints it.

    Attributes:
        text: the answer, special tokens left out.
        prompt_tokens, new_tokens: tokens read and written.
        retention: ``cache_bytes / full_cache_bytes``.
        cache_bytes: bytes held for the compressed prompt. Tokens that came after compression (the answer,
            and with ``compress_first`` the question) sit in a 16-bit tail that counts neither here nor below.
        full_cache_bytes: bytes of the same tokens in a full 16-bit cache.
        bits: under ``value`` the share of prompt tokens at each bit-width of their value (0 is evicted,
            ``pinned`` is 16 bits outside the quantiser), under ``key`` the share of key channels.
        seconds: time by phase.
        model, device, dtype: what ran, and where.
        scorer, allocator, format, budget, budget_tokens, budget_bytes: what compressed it; ``format`` is
            ``full`` and the others are absent where nothing did.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    retention: float
    cache_bytes: int
    full_cache_bytes: int
    bits: dict[str, dict[str, float]]
    seconds: Seconds
    model: str
    device: str
    dtype: str
    format: str
    scorer: str | None = None
    allocator: str | None = None
    budget: float | None = None
    budget_tokens: int | None = None
    budget_bytes: int | None = None


def run_generation(
    loaded: LoadedModel, request: GenerationRequest, compression: CompressionConfig | None
) -> GenerationReport:
    """Answer ``request`` with a compressed cache, or with transformers' own if ``compression`` is None.

    Raises:
        ConfigError: a prompt that is empty or does not fit the window.
        RdkvError: what the plugins or the cache refuse.
    """
    prompt = prepare_prompt(loaded, request)
    if compression is None:
        return _run_full(loaded, request, prompt)
    from .attention import attach, detach

    cache = CompressedCache(loaded.model.config, compression)
    attach(loaded.model)
    try:
        new, prefill, decode = _timed_generate(loaded, request, prompt, cache)
    finally:
        detach(loaded.model)
    return GenerationReport(
        **_common(loaded, prompt, new),
        retention=cache.retention,
        cache_bytes=cache.prompt_nbytes,
        full_cache_bytes=cache.prompt_full_nbytes,
        bits=cache.bits,
        seconds=Seconds(prefill - cache.compress_seconds, cache.compress_seconds, decode),
        scorer=compression.scorer,
        allocator=compression.allocator,
        format=compression.format,
        budget=compression.budget,
        budget_tokens=compression.budget_tokens,
        budget_bytes=compression.budget_bytes,
    )


def prepare_prompt(loaded: LoadedModel, request: GenerationRequest) -> Prompt:
    """The tokens of a request, checked against the model's window."""
    prompt = build_prompt(loaded.tokenizer, request.prompt, request.question, request.chat, request.compress_first)
    check_window(prompt.tokens, request.max_new_tokens, loaded.model.config)
    return prompt


@torch.inference_mode()
def read_text(loaded: LoadedModel, prompt: Prompt, cache: Any) -> None:
    """Run the model over the text of ``prompt`` alone, so that ``cache`` holds it."""
    ids = torch.tensor([prompt.text], device=loaded.device)
    loaded.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _run_full(loaded: LoadedModel, request: GenerationRequest, prompt: Prompt) -> GenerationReport:
    cache = DynamicCache(config=loaded.model.config)
    new, prefill, decode = _timed_generate(loaded, request, prompt, cache)
    # What a full cache of the prompt takes at 16 bits, whatever precision this run computed in.
    layers: list[Any] = list(cache.layers)
    numbers = sum(int(part.shape[1] * part.shape[3]) for layer in layers for part in (layer.keys, layer.values))
    nbytes = 2 * numbers * len(prompt.text)
    return GenerationReport(
        **_common(loaded, prompt, new),
        retention=1.0,
        cache_bytes=nbytes,
        full_cache_bytes=nbytes,
        bits={"value": {"16": 1.0}, "key": {"16": 1.0}},
        seconds=Seconds(prefill, 0.0, decode),
        format="full",
    )


def _common(loaded: LoadedModel, prompt: Prompt, new: list[int]) -> dict[str, Any]:
    return {
        "text": loaded.tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": prompt.tokens,
        "new_tokens": len(new),
        "model": loaded.name,
        "device": loaded.device,
        "dtype": loaded.dtype,
    }


def _timed_generate(
    loaded: LoadedModel, request: GenerationRequest, prompt: Prompt, cache: Any
) -> tuple[list[int], float, float]:
    """New token ids, seconds until the first one could be chosen, seconds from there on."""
    if request.seed is not None:
        torch.manual_seed(request.seed)
    clock = _FirstToken(loaded.device)
    start = clock.now()
    if prompt.turn:
        read_text(loaded, prompt, cache)
    ids = torch.tensor([prompt.text + prompt.turn], device=loaded.device)
    output = loaded.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=request.max_new_tokens,
        logits_processor=LogitsProcessorList([clock]),
        pad_token_id=_pad_token(loaded),
        **_sampling(request),
    )
    end = clock.now()
    first = clock.at if clock.at is not None else end
    return output[0, ids.shape[1] :].tolist(), first - start, end - first


def _sampling(request: GenerationRequest) -> dict[str, Any]:
    """Settings of transformers' ``generate``; every one is given, for a checkpoint may bring its own."""
    if request.temperature == 0:
        return {"do_sample": False, "num_beams": 1}
    return {
        "do_sample": True,
        "num_beams": 1,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": 0,
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

    def now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.at is None:
            self.at = self.now()
        return scores
