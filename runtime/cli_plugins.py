"""``rdkv plugins``: what there is to choose from, and the options of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from .cli_options import DEBUG, PLUGIN

if TYPE_CHECKING:
    from .registry import Entry, Preset, Registry


@click.command(name="plugins")
@click.argument("name", required=False)
@PLUGIN
@DEBUG
def command(name: str | None, plugins: tuple[str, ...], debug: bool | None) -> None:
    """List scorers, allocators, cache formats, presets and backends; with NAME, its options and their defaults."""
    from .registry import load_registry

    registry = load_registry(plugins)
    if name is None:
        _list(registry)
    else:
        _describe(registry, name)


def _entries(registry: Registry) -> Iterator[Entry[Any]]:
    yield from registry.scorers.values()
    yield from registry.allocators.values()
    yield from registry.formats.values()


def _list(registry: Registry) -> None:
    from rich.table import Table

    table = Table("name", "kind", "from", "what it is", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for entry in _entries(registry):
        table.add_row(entry.name, entry.kind, _source(entry), entry.summary)
    for preset in registry.presets.values():
        table.add_row(preset.name, "preset", _source(preset), _settings(preset))
    _console().print(table)
    click.echo("\n`rdkv plugins NAME` shows the options of one.\n")
    _list_backends()


def _list_backends() -> None:
    import torch
    from rich.table import Table

    from ..kernels.backends import automatic, probe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table("backend", "works", "why", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name, works, reason in probe(device):
        table.add_row(name, "yes" if works else "no", reason)
    _console().print(table)
    click.echo(f"\n`--backend auto` takes {automatic(device)} on this machine ({device.type}).")


def _describe(registry: Registry, name: str) -> None:
    from .errors import ConfigError
    from .options import did_you_mean

    found = [entry for entry in _entries(registry) if entry.name == name]
    for entry in found:
        _describe_entry(entry)
    if name in registry.presets:
        preset = registry.presets[name]
        click.echo(f"{name}: preset from {_source(preset)}")
        for key, value in preset.values.items():
            click.echo(f"  {key} = {value}")
    elif not found:
        known = [entry.name for entry in _entries(registry)] + list(registry.presets)
        raise ConfigError(f"no plugin is called '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}")


def _describe_entry(entry: Entry[Any]) -> None:
    from rich.table import Table

    from .options import describe_options

    origin = entry.origin
    qualified = f"{entry.cls.__module__}.{entry.cls.__qualname__}"
    click.echo(f"{entry.name}: {entry.kind} from {_source(entry)}, class {qualified}")
    if origin.file:
        click.echo(f"  {origin.file}")
    if entry.summary:
        click.echo(f"  {entry.summary}")
    rows = describe_options(entry.cls.Options)
    if not rows:
        click.echo("  no options\n")
        return
    table = Table("option", "type", "default", "help", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for row in rows:
        table.add_row(row.name, row.expects, "required" if row.default is None else row.default, row.description)
    _console().print(table)
    click.echo(f"\nSet one with --{entry.kind}-option {rows[0].name}={rows[0].default or 'VALUE'}\n")


def _source(entry: Entry[Any] | Preset) -> str:
    origin = entry.origin
    if origin.distribution is None:
        return origin.file or origin.module
    return " ".join(part for part in (origin.distribution, origin.version) if part)


def _settings(preset: Preset) -> str:
    return ", ".join(
        f"{key.removesuffix('s')} {k}={v}" if isinstance(value, dict) else f"{key}={value}"
        for key, value in preset.values.items()
        for k, v in (value.items() if isinstance(value, dict) else [("", "")])
    )


def _console() -> Any:
    from .console import console

    return console()
