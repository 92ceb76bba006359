"""``rdkv serve``: the command that it becomes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

import pytest

from rdkv.runtime import cli_serve
from rdkv.runtime.cli import run
from rdkv.runtime.errors import ConfigError

pytestmark = pytest.mark.usefixtures("own_streams")
ErrorLine = Callable[..., str]


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were to replace the process, with SGLang installed."""
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: commands.append(arguments))
    monkeypatch.setattr(cli_serve, "version", lambda name: "0.5.17")
    return commands


def test_flags(executed: list[list[str]]) -> None:
    flags = ["--budget", "0.05", "--scorer-option", "window=16", "--arena", "0.4"]
    assert run(["serve", "some/model", *flags, "--port", "3000", "--tp=2"]) == 0
    (command,) = executed
    at = command.index("--rdkv-config") + 1
    config = json.loads(command[at])
    assert config == {"budget": 0.05, "scorer_options": {"window": "16"}, "arena": 0.4}
    assert command[:5] == [sys.executable, "-m", "sglang.launch_server", "--model-path", "some/model"]
    assert command[5:7] == ["--attention-backend", "rdkv"]
    assert command[at + 1 :] == ["--disable-radix-cache", "--port", "3000", "--tp=2"]


def test_what_it_becomes_is_what_the_plugin_takes(executed: list[list[str]]) -> None:
    from rdkv.plugins.sglang.options import parse

    assert run(["serve", "m", "--budget-tokens", "200", "--min-tokens", "9", "--disable-radix-cache"]) == 0
    command = executed[0]
    assert command.count("--disable-radix-cache") == 1
    config = parse(command[command.index("--rdkv-config") + 1])
    assert (config.compression.budget_tokens, config.compression.budget, config.options.min_tokens) == (200, None, 9)


@pytest.mark.parametrize("flag", ["--attention-backend=triton", "--model-path"])
def test_flags_that_are_ours(executed: list[list[str]], flag: str, error_line: ErrorLine) -> None:
    line = error_line(["serve", "m", "--budget", "0.1", flag])
    assert line == f"rdkv: error: rdkv serve sets {flag.split('=')[0]} itself; leave it out"
    assert not executed


def test_without_a_budget(executed: list[list[str]], error_line: ErrorLine) -> None:
    assert "budget" in error_line(["serve", "m"])
    assert not executed


def test_other_releases_of_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_serve, "version", lambda name: "0.5.17.post1")
    cli_serve.check_release()
    monkeypatch.setattr(cli_serve, "version", lambda name: "0.5.23")
    with pytest.raises(ConfigError, match=r"SGLang 0.5.23 is installed, and rdkv serve needs 0.5.17"):
        cli_serve.check_release()


def test_without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise cli_serve.PackageNotFoundError(name)

    monkeypatch.setattr(cli_serve, "version", missing)
    with pytest.raises(ConfigError, match=r'pip install "rdkv\[sglang\]"'):
        cli_serve.check_release()
