"""Settings of a run: flags over a TOML file over a preset over defaults, checked into one Struct."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from .config import BackendName, BudgetBy, CompressionConfig, read_toml
from .errors import ConfigError

# At most one of each group counts; a layer that sets one of them overrides the others below it.
BUDGETS = ("budget", "budget_tokens", "budget_bytes")
PROMPTS = ("prompt", "prompt_file", "cache")
PLUGGABLE = ("scorer", "allocator", "format")
# A flag that can be given more than once is spelled in the singular, and its list in the plural.
SINGULAR = {f"{kind}_option": f"{kind}_options" for kind in PLUGGABLE} | {"plugin": "plugins"}


class RunSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every flag of ``rdkv generate``, ``compress`` and ``inspect``, which are also the keys of ``--config``.

    A command reads those that it has, so that one file serves them all.
    """

    model: str | None = None
    prompt: str | None = None
    prompt_file: str | None = None
    cache: str | None = None
    question: str | None = None
    chat: bool = False
    compress_first: bool = False
    max_new_tokens: int = 64
    tail_block: int | None = None
    preset: str | None = None
    scorer: str | None = None
    allocator: str | None = None
    format: str | None = None
    scorer_options: dict[str, Any] = {}
    allocator_options: dict[str, Any] = {}
    format_options: dict[str, Any] = {}
    budget: float | None = None
    budget_tokens: int | None = None
    budget_bytes: int | None = None
    calibration: str | None = None
    budget_by: BudgetBy | None = None
    backend: BackendName | None = None
    plugins: tuple[str, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    full_cache: bool = False
    json: bool = False
    png: str = "rdkv-inspect.png"
    out: str | None = None
    overwrite: bool = False
    debug: bool = False


def read_settings(flags: Mapping[str, Any], config_file: str | None) -> RunSettings:
    """Settings from flags that were given (None where one was not) and a TOML file.

    Raises:
        ConfigError: an unknown key, a value of another type, two budgets or prompts in one place, an
            unknown preset.
        PluginError: a plugin fails to load while its preset is looked up.
    """
    given = {name: value for name, value in flags.items() if value not in (None, (), {})}
    _check_groups(given, "the command line")
    layers = [given]
    if config_file is not None:
        layers.insert(0, _file_layer(config_file))
    preset = merge(*layers).get("preset")
    if preset is not None:
        from .registry import load_registry  # imports torch: only where a preset asks for it

        layers.insert(0, dict(load_registry(merge(*layers).get("plugins", ())).preset(preset)))
    return _convert(merge(*layers), "settings")


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Join layers of settings, the later over the earlier.

    Options join key by key, unless a layer chooses another plugin of their kind: then they begin anew.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for group in (BUDGETS, PROMPTS):
            if any(layer.get(name) is not None for name in group):
                merged = {name: value for name, value in merged.items() if name not in group}
        for kind in PLUGGABLE:
            options = f"{kind}_options"
            if layer.get(kind, merged.get(kind)) != merged.get(kind) and kind in merged:
                merged.pop(options, None)
            if options in layer and isinstance(layer[options], Mapping):
                layer = {**layer, options: {**merged.get(options, {}), **layer[options]}}
        merged |= layer
    return merged


def compression_config(settings: RunSettings) -> CompressionConfig:
    """What compresses the cache, with the defaults of `CompressionConfig` where nothing was set."""
    given: dict[str, Any] = {}
    for name in CompressionConfig.__struct_fields__:
        value = getattr(settings, name)
        if value not in (None, (), {}):
            given[name] = value
    if not any(name in given for name in BUDGETS):
        raise ConfigError("no budget: give --budget (a fraction, 1 keeps all), --budget-tokens or --budget-bytes")
    return CompressionConfig(**given)


def read_prompt(settings: RunSettings) -> str:
    """The text of ``--prompt`` or ``--prompt-file`` (``-`` is standard input).

    Raises:
        ConfigError: neither is given, or the file cannot be read.
    """
    if settings.prompt is not None:
        return settings.prompt
    if settings.prompt_file is None:
        raise ConfigError("no prompt: give --prompt TEXT or --prompt-file FILE")
    if settings.prompt_file == "-":
        return sys.stdin.read()
    return read_text_file(settings.prompt_file)


def read_text_file(name: str) -> str:
    """Contents of a UTF-8 file.

    Raises:
        ConfigError: it cannot be read, or is no such text.
    """
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _file_layer(path: str) -> dict[str, Any]:
    table = {SINGULAR.get(key, key): value for key, value in read_toml(path).items()}
    for key in table:
        if key not in RunSettings.__struct_fields__:
            from .options import did_you_mean

            raise ConfigError(f"{path}: unknown key '{key}'{did_you_mean(key, RunSettings.__struct_fields__)}")
    for name in ("plugins", "stop"):
        if isinstance(table.get(name), str):
            table[name] = [table[name]]
    _check_groups(table, path)
    _convert(table, path)  # on its own, so that a message names the file
    return table


def _check_groups(layer: Mapping[str, Any], where: str) -> None:
    for group in (BUDGETS, PROMPTS):
        if len(given := [name for name in group if name in layer]) > 1:
            raise ConfigError(f"{where} sets both {given[0]} and {given[1]}; set one of them")


def _convert(values: Mapping[str, Any], where: str) -> RunSettings:
    try:
        return msgspec.convert(dict(values), RunSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error
