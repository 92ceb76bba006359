"""``rdkv inspect``: what a prompt's cache is compressed to, as a table and a picture, or what is in a saved one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from .cli_generate import generation_request, load, refuse_compression, shares
from .cli_options import RUN_OPTIONS, note_debug, with_options

if TYPE_CHECKING:
    from .inspection import Inspection, LayerRow
    from .settings import RunSettings
    from .stored_inspection import StoredInspection


PNG = click.option("--png", metavar="FILE", help="Where to draw.  [default: rdkv-inspect.png]")


@click.command(name="inspect")
@with_options([*RUN_OPTIONS, PNG])
def command(config: str | None, **flags: Any) -> None:
    """Compress a prompt, print a table per layer and draw its bits and scores; generates nothing.

    With --cache, show what is in a file that `rdkv compress` saved; no model is read, and nothing is drawn.
    """
    from .errors import ConfigError
    from .settings import read_settings

    refuse_compression(flags)
    if flags["cache"] is not None and flags["png"] is not None:
        raise ConfigError("--png draws scores, and a saved cache does not hold them; leave it out")
    settings = read_settings(flags, config)
    note_debug(settings.debug)
    if settings.cache is not None:
        _inspect_file(settings, settings.cache)
    else:
        _inspect_prompt(settings)


def _inspect_prompt(settings: RunSettings) -> None:
    from .errors import ConfigError
    from .settings import compression_config, read_prompt

    if settings.full_cache:
        raise ConfigError("--full-cache leaves nothing to inspect")
    text = read_prompt(settings)
    compression = compression_config(settings)

    from .inspection import inspect_prompt

    request = generation_request(settings, text)
    inspection = inspect_prompt(load(settings, text, compression), request, compression)

    from .picture import draw

    title = (
        f"{compression.scorer}, {compression.allocator}, {compression.format}: {inspection.retention:.2%} of the bytes"
    )
    try:
        draw(inspection, settings.png, title)
    except OSError as error:
        raise ConfigError(f"cannot write {settings.png}: {error.strerror or error}") from error
    _print(inspection, settings.png, settings.json)


def _inspect_file(settings: RunSettings, file: str) -> None:
    from .stored_cache import open_cache
    from .stored_inspection import inspect_stored

    inspection = inspect_stored(open_cache(file), settings.plugins)
    if settings.json:
        click.echo(msgspec.json.encode(inspection).decode())
        return
    for line in file_summary(inspection):
        click.echo(line)
    if inspection.layers:
        click.echo()
        _print_table(inspection.layers)


def file_summary(found: StoredInspection) -> list[str]:
    """What is in a file, in a few lines."""
    prompts = "" if found.prompts == 1 else f" of {found.prompts} prompts"
    later = f", and {found.later_tokens:,} later ones" if found.later_tokens else ""
    budgets = {"budget": found.budget, "budget_tokens": found.budget_tokens, "budget_bytes": found.budget_bytes}
    budget = next(f"{name.replace('_', ' ')} {value}" for name, value in budgets.items() if value is not None)
    rows = [
        ("file", f"{found.file}, {found.file_bytes:,} bytes, by rdkv {found.rdkv}"),
        ("model", f"{found.model or 'without a name'}, {found.dtype}{', chat template' if found.chat else ''}"),
        ("tokens", f"{found.prompt_tokens:,}{prompts}{later}"),
        ("compressed by", f"{found.scorer}, {found.allocator}, {found.format}; {budget}"),
        ("cache", f"{found.cache_bytes:,} of {found.full_cache_bytes:,} bytes, retention {found.retention:.2%}"),
    ]
    return [f"{name:<22}{value}" for name, value in rows]


def _print(inspection: Inspection, png: str, as_json: bool) -> None:
    if as_json:
        report = {
            "prompt_tokens": inspection.prompt_tokens,
            "retention": inspection.retention,
            "layers": inspection.rows,
            "png": png,
        }
        click.echo(msgspec.json.encode(report).decode())
        return
    _print_table(inspection.rows)
    click.echo(f"\n{inspection.prompt_tokens:,} tokens, retention {inspection.retention:.2%}; drawn to {png}")


def _print_table(rows: list[LayerRow]) -> None:
    from rich.table import Table

    from .console import console

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("layer", "kept", "value bits", "key bits", "bytes", "retention"):
        table.add_column(name, justify="right")
    table.add_column("tokens by value width")
    table.add_column("channels by key width")
    for row in rows:
        table.add_row(
            str(row.layer), f"{row.kept:.1%}", f"{row.value_bits:.2f}", f"{row.key_bits:.2f}", f"{row.bytes:,}",
            f"{row.retention:.2%}", shares(row.values), shares(row.keys),
        )  # fmt: skip
    console().print(table)
