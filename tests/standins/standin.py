"""Modules that stand in for binary-only packages: any import from them works, using what was imported does not."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any, ClassVar


class Anything(type):
    """The type of `Absent`: it has every attribute."""

    def __getattr__(cls, name: str) -> Any:
        return absent(name, cls.__module__)


class Absent(metaclass=Anything):
    """A name of a package that is not here: it can be imported, derived from and instantiated, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def absent(name: str, module: str) -> type[Absent]:
    """An `Absent` of some name; Python's own protocols find nothing in it."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything(name, (Absent,), {"__module__": module})


class StandIn(ModuleType):
    """A module that has every name."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        return absent(name, self.__name__)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every submodule of the packages that stand in."""

    def __init__(self) -> None:
        self.packages: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package, _, rest = name.partition(".")
        if not rest or package not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


FINDER = Finder()


def stand_in(module: str) -> None:
    """Let a module that is being imported, and all below it, be stand-ins."""
    if FINDER not in sys.meta_path:
        sys.meta_path.append(FINDER)
    FINDER.packages.add(module)
    sys.modules[module].__class__ = StandIn
    sys.modules[module].__path__ = []
