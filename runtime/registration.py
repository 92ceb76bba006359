"""Registering plugins with pluggy and checking what their hooks return."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pluggy

from . import hookspecs
from .config import CompressionConfig
from .discovery import (
    Candidate,
    Origin,
    builtin_candidates,
    installed_candidates,
    load,
    module_file,
    named_candidate,
    one_line,
)
from .entries import Entry, PluginT, Preset
from .errors import PluginError
from .interfaces import PluginOptions
from .options import did_you_mean

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Loaded:
    """A plugin manager with its plugins, and their origins by their names in it."""

    manager: pluggy.PluginManager
    origins: Mapping[str, Origin]


def load_plugins(names: Sequence[str]) -> Loaded:
    """Built-in and installed plugins, and those of ``names`` (``no:NAME`` leaves one out).

    Raises:
        PluginError: a plugin failed to import, implements no hook or a wrong one.
    """
    manager = pluggy.PluginManager("rdkv")
    manager.add_hookspecs(hookspecs)
    blocked = {name.removeprefix("no:") for name in names if name.startswith("no:")}
    extras = [named_candidate(name) for name in names if not name.startswith("no:")]
    candidates = [*builtin_candidates(), *installed_candidates(), *extras]
    _check_blocked(blocked, candidates)
    origins: dict[str, Origin] = {}  # by the name in the plugin manager
    for candidate in candidates:
        if candidate.origin.plugin not in blocked:
            _register(manager, candidate, origins)
    return Loaded(manager, origins)


def _check_blocked(blocked: set[str], candidates: Iterable[Candidate]) -> None:
    known = [candidate.origin.plugin for candidate in candidates]
    for name in sorted(blocked - set(known)):
        raise PluginError(
            f"-p no:{name}: there is no plugin '{name}' to leave out{did_you_mean(name, known)}; "
            f"plugins: {', '.join(known)}"
        )


def _register(manager: pluggy.PluginManager, candidate: Candidate, origins: dict[str, Origin]) -> None:
    plugin, origin = load(candidate), candidate.origin
    if manager.is_registered(plugin):
        return  # the same module by two ways, such as installed and given to -p
    if origin.plugin in origins:
        raise PluginError(f"{origin} has the name of {origins[origin.plugin]}; one of them must be renamed or removed")
    origin = replace(origin, file=origin.file or module_file(origin.module))
    try:
        manager.register(plugin, name=origin.plugin)
    except (pluggy.PluginValidationError, TypeError) as error:
        raise PluginError(f"{origin} breaks a hook's contract: {one_line(error)}") from error
    hooks = [name for name in dir(hookspecs) if name.startswith("rdkv_")]
    callers = manager.get_hookcallers(plugin) or []
    if unknown := [caller.name for caller in callers if caller.name not in hooks]:
        raise PluginError(
            f"{origin} implements an unknown hook '{unknown[0]}'{did_you_mean(unknown[0], hooks)}; "
            f"hooks: {', '.join(hooks)}"
        )
    if candidate.required_hooks and not callers:
        raise PluginError(f"{origin} implements no hook; mark a function such as rdkv_scorers with @rdkv.hookimpl")
    origins[origin.plugin] = origin


def _results(loaded: Loaded, hook: str) -> Iterator[tuple[Origin, str, Any]]:
    """Names and values that the plugins return from ``hook``, each with its plugin."""
    # Called one by one instead of through manager.hook, so that every result has a plugin to blame.
    by_plugin = {impl.plugin_name: impl for impl in getattr(loaded.manager.hook, hook).get_hookimpls()}
    for plugin, origin in loaded.origins.items():
        if plugin not in by_plugin:
            continue
        try:
            result = by_plugin[plugin].function()
        except Exception as error:
            raise PluginError(f"{hook} of {origin} failed: {one_line(error)}") from error
        if not isinstance(result, Mapping):
            raise PluginError(f"{hook} of {origin} returned {type(result).__name__}; it must return a mapping of names")
        for name, value in result.items():
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise PluginError(
                    f"{hook} of {origin}: the name {name!r} must be lower-case words joined by '-', such as 'key-norm'"
                )
            yield origin, name, value


def collect(loaded: Loaded, kind: str, base: type[PluginT]) -> Mapping[str, Entry[PluginT]]:
    """Classes that the plugins return from the hook of ``kind``, checked against their base.

    Raises:
        PluginError: a hook failed or returned the wrong thing, or two plugins use one name.
    """
    entries: dict[str, Entry[PluginT]] = {}
    for origin, name, cls in _results(loaded, f"rdkv_{kind}s"):
        what = f"{kind} '{name}' of {origin}"
        if not isinstance(cls, type) or not issubclass(cls, base):
            raise PluginError(f"{what} is {cls!r}; it must be a subclass of rdkv.{base.__name__}")
        if missing := sorted(getattr(cls, "__abstractmethods__", ())):
            raise PluginError(f"{what} does not implement {', '.join(missing)}")
        if not isinstance(cls.Options, type) or not issubclass(cls.Options, PluginOptions):
            raise PluginError(f"{what}: Options is {cls.Options!r}; it must be a subclass of rdkv.PluginOptions")
        _refuse_duplicate(kind, name, origin, entries)
        located = replace(origin, module=cls.__module__, file=module_file(cls.__module__) or origin.file)
        entries[name] = Entry(kind, name, cls, located)
    return MappingProxyType(entries)


def collect_presets(loaded: Loaded) -> Mapping[str, Preset]:
    """Presets of all plugins; see `collect`."""
    presets: dict[str, Preset] = {}
    known = CompressionConfig.__struct_fields__
    for origin, name, values in _results(loaded, "rdkv_presets"):
        if not isinstance(values, Mapping):
            raise PluginError(f"preset '{name}' of {origin} is {type(values).__name__}; it must be a mapping")
        for key in values:
            if key not in known:
                raise PluginError(f"preset '{name}' of {origin} sets an unknown '{key}'{did_you_mean(str(key), known)}")
        _refuse_duplicate("preset", name, origin, presets)
        presets[name] = Preset(name, MappingProxyType(dict(values)), origin)
    return MappingProxyType(presets)


def _refuse_duplicate(
    kind: str, name: str, origin: Origin, entries: Mapping[str, Entry[PluginT]] | Mapping[str, Preset]
) -> None:
    if name in entries:
        raise PluginError(
            f"two plugins register the {kind} '{name}': {entries[name].origin} and {origin}; "
            f"rename one, or leave one out with -p no:{origin.plugin}"
        )
