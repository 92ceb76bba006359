"""``rdkv generate``: answer a prompt with a compressed cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .cli_options import RUN_OPTIONS, note_debug, with_options

if TYPE_CHECKING:
    from .config import CompressionConfig
    from .generation import GenerationReport, GenerationRequest
    from .loading import LoadedModel
    from .settings import RunSettings


@click.command(name="generate")
@with_options(RUN_OPTIONS)
def command(config: str | None, **flags: Any) -> None:
    """Answer a prompt with a compressed cache."""
    from .settings import read_settings

    settings = read_settings(flags, config)
    note_debug(settings.debug)
    report = generate(settings)
    if settings.json:
        import msgspec

        click.echo(msgspec.json.encode(report).decode())
    else:
        _print(report)


def generate(settings: RunSettings) -> GenerationReport:
    """Run ``rdkv generate`` with settings; everything that can be refused is, before weights are read."""
    from .settings import compression_config, read_prompt

    text = read_prompt(settings)
    compression = None if settings.full_cache else compression_config(settings)

    from .generation import run_generation

    request = generation_request(settings, text)
    return run_generation(load(settings, text, compression), request, compression)


def generation_request(settings: RunSettings, text: str) -> GenerationRequest:
    """What is asked of the model, checked."""
    from .generation import GenerationRequest

    return GenerationRequest(
        prompt=text,
        question=settings.question,
        chat=settings.chat,
        compress_first=settings.compress_first,
        max_new_tokens=settings.max_new_tokens,
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
        ("tokens by value bits", shares(report.bits["value"])),
        ("channels by key bits", shares(report.bits["key"])),
        ("seconds", f"{seconds.prefill:.2f} prefill, {seconds.compress:.2f} compress, {seconds.decode:.2f} decode"),
        ("decoded tokens/s", f"{rate:.1f}"),
    ]
    return [f"{name:<22}{value}" for name, value in rows]


def shares(table: dict[str, float]) -> str:
    """``0: 91.2%, 2: 8.1%, pinned: 0.1%``: widths in bits in the table's order, those that nothing has left out."""
    return ", ".join(f"{width}: {share:.1%}" for width, share in table.items() if share > 0)
