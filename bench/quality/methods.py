"""Methods by name: configurations of ours from a grid, a file or a preset, and peers."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

import rdkv
from rdkv.runtime.config import config_from_mapping
from rdkv.runtime.errors import ConfigError
from rdkv.runtime.options import did_you_mean
from rdkv.runtime.registry import load_registry

from .method import Method, Ours


def part(text: str) -> tuple[str, dict[str, str]]:
    """Name and options of ``NAME`` or ``NAME:option=value,option=value``.

    Raises:
        ConfigError: it is not of that form.
    """
    name, _, rest = text.partition(":")
    options: dict[str, str] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"{text!r} is not NAME:option=value,option=value")
        options[key.strip()] = value.strip()
    return name, options


def grid(scorers: Sequence[str], allocators: Sequence[str], formats: Sequence[str]) -> list[Ours]:
    """Every combination of the parts that are named; what is not named is the default and has no place in names."""
    kinds = {kind: names for kind, names in
             (("scorer", scorers), ("allocator", allocators), ("format", formats)) if names}  # fmt: skip
    made: list[Ours] = []
    for chosen in itertools.product(*kinds.values()) if kinds else ():
        settings: dict[str, Any] = {}
        for kind, text in zip(kinds, chosen, strict=True):
            name, options = part(text)
            settings[kind] = name
            if options:
                settings[f"{kind}_options"] = options
        made.append(Ours(" + ".join(chosen), settings))
    return made


def named(table: Mapping[str, Mapping[str, Any]]) -> list[Ours]:
    """Methods of a table of fields of `rdkv.CompressionConfig`; ``preset`` names what a method begins from."""
    made: list[Ours] = []
    for name, given in table.items():
        fields = dict(given)
        preset = fields.pop("preset", None)
        start = {} if preset is None else dict(load_registry(tuple(fields.get("plugins", ()))).preset(preset))
        made.append(Ours(name, {**start, **fields}))
    return made


def read_methods(path: Path, only: Sequence[str] = ()) -> list[Ours]:
    """Methods of a TOML file, each a table of `named`; those of ``only``, or all.

    Raises:
        ConfigError: the file cannot be read, or has no such method.
    """
    try:
        table = msgspec.toml.decode(path.read_bytes(), type=dict[str, dict[str, Any]])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"cannot read methods from {path}: {error}") from error
    for name in only:
        if name not in table:
            raise ConfigError(f"{path} has no method {name!r}{did_you_mean(name, table)}")
    return named({name: table[name] for name in only or table})


def peers(names: Sequence[str]) -> list[Method]:
    """Other implementations, from ``PEERS`` of `bench.quality.peers`: a function without arguments for each name.

    Raises:
        ConfigError: no such peer.
    """
    if not names:
        return []
    known: Mapping[str, Any] = importlib.import_module("bench.quality.peers").PEERS
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown peer {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return [known[name]() for name in names]


def check(methods: Sequence[Method], model_config: Any, budgets: Sequence[float]) -> None:
    """Look for mistakes before anything runs: names, options and budgets.

    Raises:
        ConfigError: what is wrong, and in which method.
    """
    names = [method.name for method in methods]
    if not methods:
        raise ConfigError("no methods: give --scorers, --allocators, --methods, --presets or --peers")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two methods are called {twice.pop()!r}")
    if "full" in names:
        raise ConfigError("'full' is the full cache, which is always measured; call the method otherwise")
    for method in methods:
        for budget in budgets:
            if isinstance(method, Ours):
                try:
                    rdkv.CompressedCache(model_config, config_from_mapping({**method.settings, "budget": budget}))
                except rdkv.RdkvError as error:
                    raise ConfigError(f"method {method.name!r}: {error}") from error
