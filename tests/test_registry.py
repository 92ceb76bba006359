"""The registry: where plugins are found, what is refused, and how options become values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rdkv.runtime.errors import ConfigError, PluginError, RdkvError
from rdkv.runtime.options import describe_options
from rdkv.runtime.registry import load_registry

HEAD = """\
import torch
from rdkv import Allocator, PluginOptions, Scorer, Scores, hookimpl

class Flat(Scorer):
    '''Every token alike.

    More words.
    '''
    def score(self, observation):
        keys = observation.keys
        return Scores(torch.ones(keys.shape[:3]), torch.ones(keys.shape[0], keys.shape[1], keys.shape[3]))
"""
GOOD = HEAD + "\n@hookimpl\ndef rdkv_scorers():\n    return {'flat': Flat}\n"

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def clean_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A current directory of the test's own; modules and paths that it added go again."""
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield
    assert [p for p in sys.path if str(tmp_path) not in p] == [p for p in path if str(tmp_path) not in p]
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a module; with ``entry``, a distribution whose entry point of that name is the module."""

    def make(name: str, text: str = GOOD, entry: str | None = None, dist: str = "my-dist") -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        if entry is not None:
            info = tmp_path / f"{dist.replace('-', '_')}-1.2.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2\n")
            (info / "entry_points.txt").write_text(f"[rdkv]\n{entry} = {name}\n")
        return path

    return make


def refused(error: type[RdkvError], plugins: tuple[str, ...] = (), *words: str) -> str:
    """The message of a failing `load_registry`, which is one line and has all ``words``."""
    with pytest.raises(error) as caught:
        load_registry(plugins)
    return checked(caught.value, *words)


def checked(error: BaseException, *words: str) -> str:
    message = str(error)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    return message


def test_builtins_are_there() -> None:
    registry = load_registry()
    assert {"attention-distortion", "snapkv", "key-norm", "streaming", "expected-attention", "random"} <= set(
        registry.scorers
    )
    assert {"waterfill", "eviction", "quantization"} <= set(registry.allocators)
    assert "mixed-bit" in registry.formats
    assert registry.preset("rdkv-paper")["allocator"] == "waterfill"
    entry = registry.scorers["snapkv"]
    assert entry.kind == "scorer"
    assert entry.origin.distribution == "rdkv"
    assert entry.origin.module == "rdkv.plugins.baselines.snapkv"
    assert entry.origin.file is not None
    assert Path(entry.origin.file).name == "snapkv.py"
    assert "arXiv 2404.14469" in entry.summary


def test_every_builtin_option_is_described() -> None:
    registry = load_registry()
    for entry in [*registry.scorers.values(), *registry.allocators.values(), *registry.formats.values()]:
        assert entry.summary, entry.name
        assert entry.make() is not None
        for row in describe_options(entry.cls.Options):
            assert row.description, f"{entry.name}: {row.name}"
            assert row.default is not None, f"{entry.name}: {row.name}"


def test_builtin_presets_can_be_used() -> None:
    registry = load_registry()
    for preset in registry.presets.values():
        values = preset.values
        registry.scorer(values["scorer"], values.get("scorer_options"))
        registry.allocator(values["allocator"], values.get("allocator_options"))
        registry.format(values.get("format", "mixed-bit"), values.get("format_options"))


def test_no_module_of_the_runtime_names_a_plugin_package() -> None:
    import rdkv.runtime.registry as registry_module

    folder = Path(registry_module.__file__).parent
    for path in folder.rglob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["from"], ["import"]):
                assert "plugins" not in words[1].split("."), f"{path.name}: {line}"
                assert "allocators" not in words[1].split("."), f"{path.name}: {line}"


@pytest.mark.parametrize("how", ["module", "path", "absolute", "environment"])
def test_local_plugin(how: str, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("flatplugin")
    name = {"module": "flatplugin", "path": "./flatplugin.py", "absolute": str(path), "environment": "flatplugin"}[how]
    if how == "environment":
        monkeypatch.setenv("RDKV_PLUGINS", f" {name} , ")
        registry = load_registry()
    else:
        registry = load_registry([name])
    entry = registry.scorers["flat"]
    assert entry.summary == "Every token alike."
    assert entry.origin.plugin == name
    assert entry.origin.distribution is None
    assert entry.origin.file is not None
    assert Path(entry.origin.file).resolve() == path.resolve()
    monkeypatch.delenv("RDKV_PLUGINS", raising=False)
    assert "flat" not in load_registry().scorers


def test_local_file_beside_its_helper_and_named_like_a_known_module(write: Write) -> None:
    import random

    write("helper_of_flat", "NAME = 'flat'\n")
    write("random", "from helper_of_flat import NAME\n" + GOOD.replace("'flat'", "NAME"))
    assert "flat" in load_registry(["./random.py"]).scorers
    assert sys.modules["random"] is random


def test_current_directory_shadows_no_installed_module(write: Write) -> None:
    assert "wave" not in sys.modules, "the test needs a module that nothing has imported yet"
    write("wave", "raise RuntimeError('the wrong wave')\n")
    write("flatplugin", "import wave\nassert wave.Wave_read\n" + GOOD)
    assert "flat" in load_registry(["flatplugin"]).scorers
    del sys.modules["wave"]


def test_registry_without_extras_is_cached() -> None:
    assert load_registry() is load_registry()
    assert load_registry(()) is load_registry([])


def test_same_module_twice_is_one_plugin(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("flatplugin")
    monkeypatch.setenv("RDKV_PLUGINS", "flatplugin")
    registry = load_registry(["flatplugin"])
    assert [origin.plugin for origin in registry.plugins].count("flatplugin") == 1


def test_entry_point(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("flatplugin", entry="flat-entry")
    monkeypatch.syspath_prepend(tmp_path)
    origin = load_registry().scorers["flat"].origin
    assert (origin.plugin, origin.distribution, origin.version) == ("flat-entry", "my-dist", "1.2")
    assert "flat" in load_registry(["flatplugin"]).scorers  # installed and named: still one plugin
    assert "flat" not in load_registry(["no:flat-entry"]).scorers


def test_broken_entry_point_is_named(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("brokenplugin", "raise RuntimeError('two\\nlines')\n", entry="broken-entry")
    monkeypatch.syspath_prepend(tmp_path)
    refused(
        PluginError, (), "broken-entry", "my-dist 1.2", "brokenplugin", "RuntimeError: two lines", "-p no:broken-entry"
    )
    assert "snapkv" in load_registry(["no:broken-entry"]).scorers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_module_of_mine\n", ["ModuleNotFoundError", "no_such_module_of_mine"]),
        ("def broken(:\n", ["SyntaxError"]),
        ("raise SystemExit(3)\n", ["SystemExit"]),
        (HEAD, ["no hook", "hookimpl"]),
        (HEAD + "@hookimpl\ndef rdkv_scorer():\n    return {}\n", ["'rdkv_scorer'", "did you mean 'rdkv_scorers'"]),
        (HEAD + "@hookimpl\ndef rdkv_scorers(config):\n    return {}\n", ["rdkv_scorers", "config"]),
        (HEAD + "@hookimpl\ndef rdkv_scorers():\n    return [Flat]\n", ["rdkv_scorers", "list", "mapping"]),
        (HEAD + "@hookimpl\ndef rdkv_scorers():\n    pass\n", ["rdkv_scorers", "NoneType", "mapping"]),
        (HEAD + "@hookimpl\ndef rdkv_scorers():\n    1 / 0\n", ["rdkv_scorers", "ZeroDivisionError"]),
        (HEAD + "@hookimpl\ndef rdkv_scorers():\n    return {'a': dict}\n", ["scorer 'a'", "rdkv.Scorer"]),
        (HEAD + "@hookimpl\ndef rdkv_scorers():\n    return {'a': Flat()}\n", ["scorer 'a'", "rdkv.Scorer"]),
        (HEAD + "@hookimpl\ndef rdkv_allocators():\n    return {'a': Flat}\n", ["allocator 'a'", "rdkv.Allocator"]),
        (HEAD + "@hookimpl\ndef rdkv_scorers():\n    return {'a': Scorer}\n", ["does not implement score"]),
        (HEAD + "@hookimpl\ndef rdkv_scorers():\n    return {'My_Flat': Flat}\n", ["'My_Flat'", "lower-case"]),
        (HEAD + "@hookimpl\ndef rdkv_scorers():\n    return {3: Flat}\n", ["3", "lower-case"]),
        (HEAD + "Flat.Options = dict\n@hookimpl\ndef rdkv_scorers():\n    return {'a': Flat}\n", ["PluginOptions"]),
        (HEAD + "@hookimpl\ndef rdkv_presets():\n    return {'a': 3}\n", ["preset 'a'", "int"]),
        (HEAD + "@hookimpl\ndef rdkv_presets():\n    return {'a': {'scorrer': 'b'}}\n", ["did you mean 'scorer'"]),
    ],
)
def test_faulty_plugin_is_named(text: str, words: list[str], write: Write) -> None:
    write("faultyplugin", text)
    refused(PluginError, ("faultyplugin.py",), "faultyplugin.py", *words)


def test_failed_file_can_be_repaired(write: Write) -> None:
    write("flatplugin", "raise RuntimeError\n")
    refused(PluginError, ("flatplugin.py",), "RuntimeError")
    write("flatplugin")
    assert "flat" in load_registry(["flatplugin.py"]).scorers


def test_missing_plugin_is_named() -> None:
    refused(PluginError, ("no_such_plugin",), "'no_such_plugin'", ".py file")
    refused(PluginError, ("no_such.plugin",), "'no_such'", ".py file")
    refused(PluginError, ("./no_such_plugin.py",), "'./no_such_plugin.py'", "no file")
    refused(PluginError, ("no:basselines",), "'basselines'")
    refused(PluginError, ("no:rdkv.plugins.baseline",), "did you mean 'rdkv.plugins.baselines'")
    with pytest.raises(PluginError, match="sequence"):
        load_registry("flatplugin")


def test_duplicate_name_names_both_plugins(write: Write) -> None:
    write("first_flat")
    write("second_flat")
    refused(PluginError, ("first_flat", "second_flat.py"), "'flat'", "first_flat", "second_flat.py")
    write("other_snapkv", GOOD.replace("'flat'", "'snapkv'"))
    refused(PluginError, ("other_snapkv",), "'snapkv'", "rdkv.plugins.baselines", "other_snapkv")
    without = load_registry(["other_snapkv", "no:rdkv.plugins.baselines"])
    assert without.scorers["snapkv"].origin.plugin == "other_snapkv"


def test_unknown_name_has_a_suggestion_and_the_list() -> None:
    registry = load_registry()
    calls: list[tuple[str, Callable[[str], Any], str, str]] = [
        ("scorer", registry.scorer, "snapvk", "snapkv"),
        ("allocator", registry.allocator, "waterfil", "waterfill"),
        ("format", registry.format, "mixedbit", "mixed-bit"),
        ("preset", registry.preset, "rdkv_paper", "rdkv-paper"),
    ]
    for kind, call, name, meant in calls:
        with pytest.raises(ConfigError) as caught:
            call(name)
        checked(caught.value, f"unknown {kind} '{name}'", f"did you mean '{meant}'", "known: ")
    with pytest.raises(ConfigError) as caught:
        registry.scorer("zzz")
    assert "did you mean" not in checked(caught.value, "streaming", "key-norm")


def test_failing_constructor_is_named(write: Write) -> None:
    write(
        "failing", GOOD.replace("    def score", "    def __init__(self, options=None):\n        1 / 0\n    def score")
    )
    registry = load_registry(["failing.py"])
    with pytest.raises(PluginError) as caught:
        registry.scorer("flat")
    checked(caught.value, "scorer 'flat'", "failing.py", "ZeroDivisionError")
