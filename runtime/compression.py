"""One prompt read and compressed, and its cache saved."""

from __future__ import annotations

from pathlib import Path

import msgspec

from .attention import detach
from .config import CompressionConfig
from .engine.engine import Engine
from .full_generation import now
from .loading import LoadedModel, lasting_name
from .prompt import Prompt, check_window, document
from .store import save


class CompressionSeconds(msgspec.Struct, frozen=True):
    """Wall-clock time of each phase, in seconds; ``prefill`` does not include ``compress``."""

    prefill: float
    compress: float
    save: float


class CompressionReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was saved, and what it took; ``rdkv compress --json`` prints it.

    Attributes:
        file: where it is.
        file_bytes: bytes of the file, header and token ids included.
        prompt_tokens: tokens read.
        retention: ``cache_bytes / full_cache_bytes``.
        cache_bytes: bytes held for the compressed prompt.
        full_cache_bytes: bytes of the same tokens in a full 16-bit cache.
        seconds: time by phase.
        model, device, dtype: what ran, and where.
        scorer, allocator, format, budget, budget_tokens, budget_bytes: what compressed it.
    """

    file: str
    file_bytes: int
    prompt_tokens: int
    retention: float
    cache_bytes: int
    full_cache_bytes: int
    seconds: CompressionSeconds
    model: str
    device: str
    dtype: str
    scorer: str
    allocator: str
    format: str
    budget: float | None = None
    budget_tokens: int | None = None
    budget_bytes: int | None = None


def compress_prompt(
    loaded: LoadedModel, text: str, chat: bool, compression: CompressionConfig, path: Path, overwrite: bool = False
) -> CompressionReport:
    """Read ``text``, compress its cache and save it, so that questions can follow it.

    Args:
        chat: make it the beginning of a user's message in the tokenizer's chat template.
        path, overwrite: see `rdkv.save`.

    Raises:
        ConfigError: a text that is empty or does not fit the window; see `rdkv.save`.
        CacheFileError: the file cannot be written.
        RdkvError: what the plugins or the cache refuse.
    """
    prompt = Prompt(document(loaded.tokenizer, text, chat))
    check_window(prompt.tokens, 1, loaded.model.config)
    try:
        start = now(loaded.device)
        cache = Engine(loaded.model, compression, loaded.tokenizer).compress(prompt.text).cache
        read = now(loaded.device)
    finally:
        detach(loaded.model)
    name = lasting_name(loaded.name)
    save(cache, path, loaded.model, [prompt.text], loaded.tokenizer, chat=chat, name=name, overwrite=overwrite)
    saved = now(loaded.device)
    return CompressionReport(
        file=str(path),
        file_bytes=path.stat().st_size,
        prompt_tokens=prompt.tokens,
        retention=cache.retention,
        cache_bytes=cache.prompt_nbytes,
        full_cache_bytes=cache.prompt_full_nbytes,
        seconds=CompressionSeconds(read - start - cache.compress_seconds, cache.compress_seconds, saved - read),
        model=loaded.name,
        device=loaded.device,
        dtype=loaded.dtype,
        **compression.choices,
    )
