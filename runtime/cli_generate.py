"""``rdkv generate``: answer a prompt with a compressed cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
import msgspec

from .cli_options import COMPRESSION_FLAGS, RUN_OPTIONS, note_debug, with_options

if TYPE_CHECKING:
    from .config import CompressionConfig
    from .generation import GenerationReport, GenerationRequest
    from .loading import LoadedModel
    from .settings import RunSettings


@click.command(name="generate")
@with_options(RUN_OPTIONS)
def command(config: str | None, **flags: Any) -> None:
    """Answer a prompt with a compressed cache, or a question on one that `rdkv compress` saved."""
    from .settings import read_settings

    refuse_compression(flags)
    settings = read_settings(flags, config)
    note_debug(settings.debug)
    report = generate(settings)
    if settings.json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        _print(report)


def refuse_compression(flags: Mapping[str, Any]) -> None:
    """Refuse flags of compression beside ``--cache``, which brings what is compressed."""
    from .errors import ConfigError

    if flags["cache"] is None:
        return
    for name in COMPRESSION_FLAGS:
        if flags[name] not in (None, {}, ()):
            flag = name.removesuffix("s") if name.endswith("_options") else name
            raise ConfigError(f"--{flag.replace('_', '-')} has no effect on a prompt that --cache brings compressed")


def generate(settings: RunSettings) -> GenerationReport:
    """Run ``rdkv generate`` with settings; everything that can be refused is, before weights are read."""
    if settings.cache is not None:
        return _generate_from_cache(settings, settings.cache)
    from .settings import compression_config, read_prompt

    text = read_prompt(settings)
    compression = None if settings.full_cache else compression_config(settings)

    from .generation import run_generation

    request = generation_request(settings, text)
    return run_generation(load(settings, text, compression), request, compression)


def _generate_from_cache(settings: RunSettings, file: str) -> GenerationReport:
    """Answer a question on a cache that ``rdkv compress`` saved, with the model that made it."""
    from .errors import ConfigError, ModelLoadError
    from .generation import continue_generation
    from .loading import load_model
    from .stored_cache import open_cache

    stored = open_cache(file)
    request = generation_request(settings, "")
    if settings.full_cache:
        raise ConfigError(f"--full-cache compresses nothing, and {file} is compressed; leave one of them out")
    if settings.question is None:
        raise ConfigError(f"{file} holds a prompt that was read before; ask something about it with --question")
    if settings.chat and not stored.header.chat:
        raise ConfigError(f"{file} was made without the chat template; leave --chat out, or compress again with it")
    record = stored.header.model
    if not (name := settings.model or record.name):
        raise ConfigError(f"{file} does not say how its model is called; give --model")
    stored.cache_format(settings.plugins)
    dtype = record.dtype if settings.dtype == "auto" else settings.dtype
    try:
        loaded = load_model(name, settings.device, dtype, stored.check_config)
    except ModelLoadError as error:
        hint = "" if settings.model else f" (it is the model that {file} names; --model says where it is now)"
        raise ModelLoadError(f"{error}{hint}") from error
    cache = stored.restore(loaded.model, loaded.tokenizer, settings.plugins, settings.backend or "auto")
    return continue_generation(loaded, msgspec.structs.replace(request, chat=stored.header.chat), cache)


def generation_request(settings: RunSettings, text: str) -> GenerationRequest:
    """What is asked of the model, checked."""
    from .generation import GenerationRequest

    return GenerationRequest(
        prompt=text,
        question=settings.question,
        chat=settings.chat,
        compress_first=settings.compress_first,
        max_new_tokens=settings.max_new_tokens,
        tail_block=settings.tail_block,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        stop=settings.stop,
        seed=settings.seed,
    )


def load(settings: RunSettings, text: str, compression: CompressionConfig | None) -> LoadedModel:
    """The model, unless the prompt is empty, the model cannot work so, or a plugin's name is unknown."""
    from .cache import CompressedCache
    from .errors import ConfigError
    from .loading import load_model

    if settings.model is None:
        raise ConfigError("no model: give --model (a folder, a GGUF file, a Hugging Face id, or smollm2-135m)")
    if not text.strip():
        raise ConfigError("the prompt is empty")

    def check(config: Any) -> None:
        if compression is not None:
            CompressedCache(config, compression)

    return load_model(settings.model, settings.device, settings.dtype, check)


def _print(report: GenerationReport) -> None:
    click.echo(report.text.strip())
    click.echo()
    for line in summary(report):
        click.echo(line)


def summary(report: GenerationReport) -> list[str]:
    """What the run took, in a few lines."""
    seconds, held, full = report.seconds, report.cache_bytes, report.full_cache_bytes
    rate = report.new_tokens / seconds.decode if seconds.decode > 0 else 0.0
    rows = [
        ("tokens", f"{report.prompt_tokens:,} read, {report.new_tokens} written"),
        ("cache", f"{held:,} of {full:,} bytes, retention {report.retention:.2%}"),
        *([("tokens by value bits", shares(report.bits["value"]))] if report.bits else []),
        *([("channels by key bits", shares(report.bits["key"]))] if report.bits else []),
        ("seconds", f"{seconds.prefill:.2f} prefill, {seconds.compress:.2f} compress, {seconds.decode:.2f} decode"),
        ("decoded tokens/s", f"{rate:.1f}"),
    ]
    return [f"{name:<22}{value}" for name, value in rows]


def shares(table: dict[str, float]) -> str:
    """``0: 91.2%, 2: 8.1%, pinned: 0.1%``: widths in bits in the table's order, those that nothing has left out."""
    return ", ".join(f"{width}: {share:.1%}" for width, share in table.items() if share > 0)
