"""Everything that plugins registered, by name: scorers, allocators, cache formats and presets."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .discovery import Origin
from .entries import Entry, Preset
from .errors import ConfigError, PluginError
from .interfaces import Allocator, CacheFormat, Scorer
from .options import did_you_mean
from .registration import collect, collect_presets, load_plugins

__all__ = ["ENVIRONMENT", "Entry", "Origin", "Preset", "Registry", "load_registry"]

ENVIRONMENT = "RDKV_PLUGINS"

GotT = TypeVar("GotT")


@dataclass(frozen=True)
class Registry:
    """What is there to choose from. Mappings are in the order of registration, built-ins first."""

    scorers: Mapping[str, Entry[Scorer]]
    allocators: Mapping[str, Entry[Allocator]]
    formats: Mapping[str, Entry[CacheFormat]]
    presets: Mapping[str, Preset]
    plugins: tuple[Origin, ...]

    def scorer(self, name: str, options: Mapping[str, Any] | None = None) -> Scorer:
        """The scorer called ``name`` with ``options``: typed values, or strings as flags give them.

        Raises:
            ConfigError: unknown name, unknown option or a value that it does not take.
            PluginError: its constructor failed.
        """
        return _get("scorer", self.scorers, name).make(options)

    def allocator(self, name: str, options: Mapping[str, Any] | None = None) -> Allocator:
        """The allocator called ``name``; see `scorer`."""
        return _get("allocator", self.allocators, name).make(options)

    def format(self, name: str, options: Mapping[str, Any] | None = None) -> CacheFormat:
        """The cache format called ``name``; see `scorer`."""
        return _get("format", self.formats, name).make(options)

    def preset(self, name: str) -> Mapping[str, Any]:
        """Settings of the preset called ``name``.

        Raises:
            ConfigError: unknown name.
        """
        return _get("preset", self.presets, name).values


def load_registry(plugins: Sequence[str] = ()) -> Registry:
    """Built-in and installed plugins, those of ``RDKV_PLUGINS`` (comma-separated), and ``plugins``.

    A name is a module or the path of a ``.py`` file; ``no:NAME`` leaves the plugin of that name out.

    Raises:
        PluginError: a plugin failed to import, breaks the contract of a hook, or takes another's name.
    """
    if isinstance(plugins, str):
        raise PluginError(f"plugins is the text {plugins!r}; it must be a sequence of names such as [{plugins!r}]")
    environment = os.environ.get(ENVIRONMENT, "")
    if not plugins:
        return _without_extras(environment, str(Path.cwd()), tuple(sys.path))
    return _build([*_split(environment), *plugins])


@functools.lru_cache(maxsize=8)
def _without_extras(environment: str, folder: str, path: tuple[str, ...]) -> Registry:
    del folder, path  # part of the key: where modules and installed plugins are found
    return _build(_split(environment))


def _build(names: Sequence[str]) -> Registry:
    loaded = load_plugins(names)
    return Registry(
        # The bases are abstract: they say what to look for and are never instantiated.
        scorers=collect(loaded, "scorer", Scorer),  # type: ignore[type-abstract]
        allocators=collect(loaded, "allocator", Allocator),  # type: ignore[type-abstract]
        formats=collect(loaded, "format", CacheFormat),  # type: ignore[type-abstract]
        presets=collect_presets(loaded),
        plugins=tuple(loaded.origins.values()),
    )


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _get(kind: str, entries: Mapping[str, GotT], name: str) -> GotT:
    if name not in entries:
        known = ", ".join(entries) or "none"
        raise ConfigError(f"unknown {kind} {name!r}{did_you_mean(name, entries)}; known: {known}")
    return entries[name]
