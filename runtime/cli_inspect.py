"""``rdkv inspect``: what a prompt's cache is compressed to, as a table and a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .cli_generate import generation_request, load, shares
from .cli_options import RUN_OPTIONS, note_debug, with_options

if TYPE_CHECKING:
    from .inspection import Inspection


PNG = click.option("--png", metavar="FILE", help="Where to draw.  [default: rdkv-inspect.png]")


@click.command(name="inspect")
@with_options([*RUN_OPTIONS, PNG])
def command(config: str | None, **flags: Any) -> None:
    """Compress a prompt, print a table per layer and draw its bits and scores; generates nothing."""
    from .errors import ConfigError
    from .settings import compression_config, read_prompt, read_settings

    settings = read_settings(flags, config)
    note_debug(settings.debug)
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


def _print(inspection: Inspection, png: str, as_json: bool) -> None:
    if as_json:
        import msgspec

        report = {
            "prompt_tokens": inspection.prompt_tokens,
            "retention": inspection.retention,
            "layers": inspection.rows,
            "png": png,
        }
        click.echo(msgspec.json.encode(report).decode())
        return
    from rich.table import Table

    from .console import console

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("layer", "kept", "value bits", "key bits", "bytes", "retention"):
        table.add_column(name, justify="right")
    table.add_column("tokens by value width")
    table.add_column("channels by key width")
    for row in inspection.rows:
        table.add_row(
            str(row.layer), f"{row.kept:.1%}", f"{row.value_bits:.2f}", f"{row.key_bits:.2f}", f"{row.bytes:,}",
            f"{row.retention:.2%}", shares(row.values), shares(row.keys),
        )  # fmt: skip
    console().print(table)
    click.echo(f"\n{inspection.prompt_tokens:,} tokens, retention {inspection.retention:.2%}; drawn to {png}")
