"""What a plugin registers: a class under a name, or a preset."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .discovery import Origin, one_line
from .errors import PluginError, RdkvError
from .interfaces import Allocator, CacheFormat, Scorer
from .options import parse_options

PluginT = TypeVar("PluginT", Scorer, Allocator, CacheFormat)


@dataclass(frozen=True)
class Entry(Generic[PluginT]):
    """A registered class: ``kind`` is ``scorer``, ``allocator`` or ``format``."""

    kind: str
    name: str
    cls: type[PluginT]
    origin: Origin

    @property
    def summary(self) -> str:
        """First paragraph of the class's docstring, on one line; empty if it has none of its own."""
        doc = inspect.cleandoc(self.cls.__doc__ or "")
        return " ".join(doc.split("\n\n")[0].split())

    def make(self, options: Mapping[str, Any] | None = None) -> PluginT:
        """An instance with the given options.

        Raises:
            ConfigError: an option that it lacks, or a value that it does not take.
            PluginError: its constructor failed.
        """
        parsed = parse_options(self.cls.Options, options, f"{self.kind} '{self.name}'")
        try:
            return self.cls(parsed)
        except RdkvError:
            raise
        except Exception as error:
            raise PluginError(f"{self.kind} '{self.name}' of {self.origin} failed: {one_line(error)}") from error


@dataclass(frozen=True)
class Preset:
    """Named settings: fields of `CompressionConfig`."""

    name: str
    values: Mapping[str, Any]
    origin: Origin
