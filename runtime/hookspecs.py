"""The hooks that a plugin may implement, as pytest's are.

A plugin is a module (or object) with functions of these names marked ``@rdkv.hookimpl``. It is found
through the entry-point group ``rdkv``, ``-p MODULE``, or the environment variable ``RDKV_PLUGINS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pluggy

from .interfaces import Allocator, CacheFormat, Scorer

hookspec = pluggy.HookspecMarker("rdkv")
hookimpl = pluggy.HookimplMarker("rdkv")


@hookspec
def rdkv_scorers() -> Mapping[str, type[Scorer]]:  # type: ignore[empty-body]
    """Scorers by name, the name that ``--scorer`` takes (lower case, words joined by ``-``)."""


@hookspec
def rdkv_allocators() -> Mapping[str, type[Allocator]]:  # type: ignore[empty-body]
    """Allocators by name, the name that ``--allocator`` takes."""


@hookspec
def rdkv_formats() -> Mapping[str, type[CacheFormat]]:  # type: ignore[empty-body]
    """Cache formats by name, the name that ``--format`` takes."""


@hookspec
def rdkv_presets() -> Mapping[str, Mapping[str, Any]]:  # type: ignore[empty-body]
    """Presets by name: fields of `rdkv.CompressionConfig` that ``--preset`` fills in."""
