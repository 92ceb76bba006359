"""``rdkv calibrate``: measure what a cache format loses on a model, at each width and in each head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .cli_options import DEBUG, DEVICE, DTYPE, MODEL, PLUGIN, pairs, with_options

if TYPE_CHECKING:
    from pathlib import Path

    from .calibration import Calibration

OPTIONS = [
    MODEL,
    click.option("--format", "format_name", default="mixed-bit", show_default=True, metavar="NAME",
                 help="Which cache format."),
    click.option("--format-option", "format_options", multiple=True, callback=pairs, metavar="K=V",
                 help="An option of the format. Repeatable."),
    click.option("--text-file", metavar="FILE", help="Measure on this text.  [default: Python's language reference]"),
    click.option("--tokens", type=click.IntRange(min=16), default=2048, show_default=True,
                 help="Read at most this many tokens at once."),
    click.option("--skip", type=click.IntRange(min=0), default=4, show_default=True,
                 help="Leave out this many first tokens, which scorers pin at full precision."),
    click.option("--prompts", type=click.IntRange(min=0), default=12, show_default=True,
                 help="Measure heads on so many prompts of the text; 0 for none: even budgets."),
    PLUGIN,
    DEVICE,
    DTYPE,
    click.option("--json", "as_json", is_flag=True, help="Print the file's contents."),
    DEBUG,
]  # fmt: skip


@click.command(name="calibrate")
@with_options(OPTIONS)
def command(
    model: str | None,
    format_name: str,
    format_options: dict[str, str],
    text_file: str | None,
    tokens: int,
    skip: int,
    prompts: int,
    plugins: tuple[str, ...],
    device: str | None,
    dtype: str | None,
    as_json: bool,
    debug: bool | None,
) -> None:
    """Measure what each bit-width of a cache format and each head loses on a model, and keep it for later runs."""
    from .errors import ConfigError

    if model is None:
        raise ConfigError("no model: give --model (a folder, a GGUF file, a Hugging Face id, or smollm2-135m)")

    from .calibration import calibrate, python_reference, save_calibration
    from .loading import load_model
    from .registry import load_registry
    from .settings import read_text_file

    cache_format = load_registry(plugins).format(format_name, format_options)
    text = python_reference() if text_file is None else read_text_file(text_file)
    source = "Python language reference" if text_file is None else text_file
    loaded = load_model(model, device or "auto", dtype or "auto")
    calibration = calibrate(loaded, cache_format, format_name, text, source, tokens, skip, prompts)
    path = save_calibration(calibration, loaded.model.config)
    _print(calibration, path, as_json)


def _print(calibration: Calibration, path: Path, as_json: bool) -> None:
    import msgspec

    if as_json:
        click.echo(msgspec.json.encode(calibration).decode())
        return
    from .console import console

    table: Any = _table(calibration)
    console().print(table)
    if calibration.heads:
        from .budget import head_weights, layer_shares

        shares = layer_shares(calibration.layers)
        click.echo("\nbytes of each layer, of an even budget, and weights of its heads:")
        for layer, (share, losses) in enumerate(zip(shares, calibration.heads, strict=True)):
            click.echo(f"{layer:3} {share:.2f}: {', '.join(f'{weight:.2f}' for weight in head_weights(losses))}")
    click.echo(f"\n{calibration.tokens} tokens of {calibration.text}; kept in {path}, where runs with this model look")


def _table(calibration: Calibration) -> Any:
    from rich.table import Table

    table = Table("bits", "values", "keys", box=None, padding=(0, 2, 0, 0), header_style="bold")
    value, key = calibration.distortion.value, calibration.distortion.key
    for width in sorted(value.keys() | key.keys()):
        cells = (f"{losses[width]:.3g}" if width in losses else "" for losses in (value, key))
        table.add_row(str(width), *cells)
    return table
