"""One measured run: a prompt is read, its cache compressed, and an answer decoded from the packed form."""

from __future__ import annotations

from typing import Any

import msgspec
from transformers import DynamicCache

from .cache import CompressedCache
from .config import CompressionConfig
from .engine.blocks import TailBlock
from .engine.sampling import Sampling
from .errors import ConfigError
from .full_generation import generate_full, now
from .loading import LoadedModel
from .prompt import Prompt, build_prompt, check_window, turn


class GenerationRequest(Sampling, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to ask of a model, and how to sample its answer.

    Attributes:
        prompt: the text whose cache is compressed; empty where a cache that was saved holds it.
        question: appended to the prompt, see `build_prompt`.
        chat: use the tokenizer's chat template.
        compress_first: compress the text before the question is seen.
        tail_block: tokens of a block in which a long answer is compressed, see `Engine`; 0 for never, None for the
            engine's own choice.

    Raises:
        ConfigError: a value out of range.
    """

    prompt: str = ""
    question: str | None = None
    chat: bool = False
    compress_first: bool = False
    tail_block: int | None = None


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
            ``pinned`` is 16 bits outside the quantiser), under ``key`` the share of key channels. Empty where the
            format was told not to keep positions.
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
    return _run_engine(loaded, request, prompt, compression)


def continue_generation(loaded: LoadedModel, request: GenerationRequest, cache: CompressedCache) -> GenerationReport:
    """Answer the question of ``request`` on what ``cache`` holds since it was loaded (`rdkv.load`).

    Raises:
        ConfigError: no question, one that does not fit the window, or a cache of several prompts.
    """
    if cache.token_ids is None or len(cache.prompt_lengths) != 1:
        raise ConfigError(f"the cache holds {len(cache.prompt_lengths)} prompts; a question is asked of one")
    if request.question is None:
        raise ConfigError("a cache that was saved is asked something: give --question")
    (held,) = cache.token_ids.tolist()
    (packed,) = cache.prompt_lengths  # a fork of the cache has the prompt alone: what came after it is read again
    question = turn(loaded.tokenizer, request.question, request.chat)
    prompt = Prompt(tuple(held[:packed]), (*held[packed:], *question))
    check_window(prompt.tokens, request.max_new_tokens, loaded.model.config)
    return _run_engine(loaded, request, prompt, cache.session.config, cache)


def _run_engine(
    loaded: LoadedModel,
    request: GenerationRequest,
    prompt: Prompt,
    compression: CompressionConfig,
    cache: CompressedCache | None = None,
) -> GenerationReport:
    """Read the text of ``prompt``, unless ``cache`` holds it, and answer."""
    from .attention import detach
    from .engine.engine import CompressedPrompt, Engine

    times = [now(loaded.device)]
    try:
        block: TailBlock = "auto" if request.tail_block is None else request.tail_block or None
        engine = Engine(loaded.model, compression, loaded.tokenizer, tail_block=block)
        document = engine.compress(prompt.text) if cache is None else CompressedPrompt(cache, None)
        pieces = []
        for piece in engine.stream([prompt.turn], request, after=document):
            pieces.append(piece.text)
            times.append(now(loaded.device))
    finally:
        detach(loaded.model)
    cache, (begin, first, *_) = document.cache, times
    return GenerationReport(
        **_common(loaded, prompt, "".join(pieces), len(pieces)),
        retention=cache.retention,
        cache_bytes=cache.prompt_nbytes,
        full_cache_bytes=cache.prompt_full_nbytes,
        bits=_bits(cache),
        seconds=Seconds(first - begin - cache.compress_seconds, cache.compress_seconds, times[-1] - first),
        **compression.choices,
    )


def _bits(cache: CompressedCache) -> dict[str, dict[str, float]]:
    try:
        return cache.bits
    except ConfigError:  # without positions there is no plan
        return {}


def prepare_prompt(loaded: LoadedModel, request: GenerationRequest) -> Prompt:
    """The tokens of a request, checked against the model's window."""
    prompt = build_prompt(loaded.tokenizer, request.prompt, request.question, request.chat, request.compress_first)
    check_window(prompt.tokens, request.max_new_tokens, loaded.model.config)
    return prompt


def _run_full(loaded: LoadedModel, request: GenerationRequest, prompt: Prompt) -> GenerationReport:
    cache = DynamicCache(config=loaded.model.config)
    answer, prefill, decode = generate_full(loaded, request, prompt, cache)
    # What a full cache of the prompt takes at 16 bits, whatever precision this run computed in.
    layers: list[Any] = list(cache.layers)
    numbers = sum(int(part.shape[1] * part.shape[3]) for layer in layers for part in (layer.keys, layer.values))
    nbytes = 2 * numbers * len(prompt.text)
    return GenerationReport(
        **_common(loaded, prompt, answer.text, len(answer.tokens)),
        retention=1.0,
        cache_bytes=nbytes,
        full_cache_bytes=nbytes,
        bits={"value": {"16": 1.0}, "key": {"16": 1.0}},
        seconds=Seconds(prefill, 0.0, decode),
        format="full",
    )


def _common(loaded: LoadedModel, prompt: Prompt, text: str, new_tokens: int) -> dict[str, Any]:
    return {
        "text": text,
        "prompt_tokens": prompt.tokens,
        "new_tokens": new_tokens,
        "model": loaded.name,
        "device": loaded.device,
        "dtype": loaded.dtype,
    }
