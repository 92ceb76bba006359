"""``rdkv compress``: read a prompt once and save its compressed cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from .cli_generate import load
from .cli_options import (
    CHAT,
    COMPRESSION_OPTIONS,
    CONFIG,
    DEBUG,
    DEVICE,
    DTYPE,
    JSON,
    MODEL,
    PLUGIN,
    PROMPT_OPTIONS,
    note_debug,
    switch,
    with_options,
)

if TYPE_CHECKING:
    from .compression import CompressionReport
    from .settings import RunSettings

OPTIONS = [
    MODEL,
    *PROMPT_OPTIONS,
    click.option("--out", metavar="FILE", help="The file to save to, such as report.rdkv."),
    switch("overwrite", "Replace the file if it exists."),
    CHAT,
    *COMPRESSION_OPTIONS,
    PLUGIN,
    CONFIG,
    DEVICE,
    DTYPE,
    JSON,
    DEBUG,
]


@click.command(name="compress")
@with_options(OPTIONS)
def command(config: str | None, **flags: Any) -> None:
    """Read a prompt once and save its compressed cache; `rdkv generate --cache FILE` answers questions on it."""
    from .settings import read_settings

    settings = read_settings(flags, config)
    note_debug(settings.debug)
    report = compress(settings)
    if settings.json:
        click.echo(msgspec.json.encode(report).decode())
        return
    for line in summary(report):
        click.echo(line)


def compress(settings: RunSettings) -> CompressionReport:
    """Run ``rdkv compress`` with settings; everything that can be refused is, before weights are read."""
    from .errors import ConfigError
    from .registry import load_registry
    from .settings import compression_config, read_prompt
    from .store import check_savable, check_target

    if settings.out is None:
        raise ConfigError("no file to save to: give --out FILE")
    if settings.full_cache:
        raise ConfigError("--full-cache leaves nothing to compress; --budget 1 keeps everything as it is")
    path = Path(settings.out).expanduser()
    check_target(path, settings.overwrite)
    text = read_prompt(settings)
    compression = compression_config(settings)
    cache_format = load_registry(compression.plugins).format(compression.format, compression.format_options)
    check_savable(cache_format, compression.format)

    from .compression import compress_prompt

    return compress_prompt(
        load(settings, text, compression), text, settings.chat, compression, path, settings.overwrite
    )


def summary(report: CompressionReport) -> list[str]:
    """What was saved, in a few lines."""
    seconds, held, full = report.seconds, report.cache_bytes, report.full_cache_bytes
    rows = [
        ("tokens", f"{report.prompt_tokens:,} read"),
        ("cache", f"{held:,} of {full:,} bytes, retention {report.retention:.2%}"),
        ("seconds", f"{seconds.prefill:.2f} prefill, {seconds.compress:.2f} compress, {seconds.save:.2f} save"),
        ("file", f"{report.file}, {report.file_bytes:,} bytes"),
    ]
    return [f"{name:<22}{value}" for name, value in rows]
