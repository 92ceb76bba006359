"""Finding plugins: built-in modules, installed entry points, ``RDKV_PLUGINS`` and ``-p``.

Nothing is skipped in silence: a plugin that cannot be imported is an error that names it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import PluginError

GROUP = "rdkv"  # of entry points
BUILTINS = ("rdkv.allocators", "rdkv.plugins.rdkv", "rdkv.plugins.baselines")


@dataclass(frozen=True)
class Origin:
    """Where something registered comes from.

    Attributes:
        plugin: the plugin's name: of its entry point, or the module or path it was given as.
        module: dotted name of the module.
        file: its file, if it has one.
        distribution: the installed distribution, or None for a local file or module.
        version: the distribution's version, if known.
    """

    plugin: str
    module: str
    file: str | None = None
    distribution: str | None = None
    version: str | None = None

    def __str__(self) -> str:
        """``plugin NAME (DISTRIBUTION VERSION, module MODULE)``."""
        package = " ".join(part for part in (self.distribution, self.version) if part)
        return f"plugin '{self.plugin}' ({package + ', ' if package else ''}module {self.module})"


@dataclass(frozen=True)
class Candidate:
    """A plugin that was named, not yet imported."""

    origin: Origin
    load: Callable[[], Any]
    required_hooks: bool = True  # a plugin without a single hook is a mistake; a built-in may be empty


def builtin_candidates() -> Iterator[Candidate]:
    """The modules that come with rdkv, met by name so that the runtime imports none of them itself."""
    version = _version("rdkv")
    for module in BUILTINS:
        yield Candidate(
            Origin(module, module, distribution="rdkv", version=version),
            lambda module=module: importlib.import_module(module),  # type: ignore[misc]
            required_hooks=False,
        )


def installed_candidates() -> Iterator[Candidate]:
    """Entry points of group ``rdkv``, in the order of their names."""
    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        dist = point.dist
        yield Candidate(
            Origin(
                point.name,
                point.module,
                distribution=dist.name if dist is not None else None,
                version=dist.version if dist is not None else None,
            ),
            point.load,
        )


def named_candidate(name: str) -> Candidate:
    """The plugin of a ``-p`` value: the path of a ``.py`` file, or a module's dotted name."""
    if name.endswith(".py"):
        path = Path(name).expanduser().resolve()
        return Candidate(Origin(name, _file_module(path), str(path)), lambda: _import_file(name, path))
    return Candidate(Origin(name, name), lambda: _import_module(name))


def load(candidate: Candidate) -> Any:
    """Import the plugin.

    Raises:
        PluginError: whatever went wrong, on one line, with the plugin's name and the way around it.
    """
    try:
        return candidate.load()
    except PluginError:
        raise
    except (Exception, SystemExit) as error:
        origin = candidate.origin
        remedy = f"uninstall it, or leave it out with -p no:{origin.plugin}" if origin.distribution else "fix it"
        raise PluginError(f"{origin} failed to import: {one_line(error)}; {remedy}") from error


def one_line(error: BaseException) -> str:
    """An exception's type and message on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def module_file(module: str) -> str | None:
    """File of an imported module."""
    return getattr(sys.modules.get(module), "__file__", None)


def _import_module(name: str) -> ModuleType:
    with _on_path(Path.cwd()):
        importlib.invalidate_caches()  # the file may be younger than the last look at its folder
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the plugin was found; something that it imports was not
            raise PluginError(
                f"plugin '{name}': no module named '{error.name}' on the Python path or in the current directory; "
                "-p takes a module's dotted name or the path of a .py file"
            ) from error


def _import_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise PluginError(f"plugin '{name}': there is no file {path}")
    module_name = _file_module(path)
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before it runs: msgspec looks annotations up there
    try:
        with _on_path(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _file_module(path: Path) -> str:
    # Unique for each path: a file called random.py must not become the module ``random``.
    return f"rdkv_local_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    # At the end, so that a file in the folder never shadows an installed module.
    sys.path.append(str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            # The last one is ours, also where the plugin itself changed the path.
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(str(folder))]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
