"""Flags over file over preset over defaults."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from rdkv.kernels.backends import NAMES
from rdkv.runtime import cli_options, registry
from rdkv.runtime.config import BackendName, CompressionConfig
from rdkv.runtime.errors import ConfigError
from rdkv.runtime.settings import RunSettings, compression_config, merge, read_prompt, read_settings


def toml(path: Path, text: str) -> str:
    (path / "run.toml").write_text(text)
    return str(path / "run.toml")


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path, 'model = "a"\nmax-new-tokens = 3\nchat = true\nbudget = 0.5\n')
    settings = read_settings({"model": "b", "chat": None, "budget_tokens": 9, "prompt": None}, file)
    assert (settings.model, settings.max_new_tokens, settings.chat) == ("b", 3, True)
    assert (settings.budget, settings.budget_tokens) == (None, 9)


def test_a_flag_can_switch_off_what_the_file_switched_on(tmp_path: Path) -> None:
    assert not read_settings({"chat": False}, toml(tmp_path, "chat = true")).chat


def test_prompt_of_a_flag_replaces_the_files(tmp_path: Path) -> None:
    settings = read_settings({"prompt": "here"}, toml(tmp_path, 'prompt_file = "there"'))
    assert (settings.prompt, settings.prompt_file) == ("here", None)


def test_a_saved_prompt_replaces_another(tmp_path: Path) -> None:
    settings = read_settings({"cache": "doc.rdkv"}, toml(tmp_path, 'prompt_file = "there"'))
    assert (settings.cache, settings.prompt_file) == ("doc.rdkv", None)
    with pytest.raises(ConfigError, match="the command line sets both prompt and cache"):
        read_settings({"cache": "doc.rdkv", "prompt": "here"}, None)


def test_every_spelling_of_a_key(tmp_path: Path) -> None:
    file = toml(tmp_path, 'plugin = "a"\n[scorer-option]\nwindow = 8\n[format_options]\nx = 1\n')
    settings = read_settings({}, file)
    assert settings.plugins == ("a",)
    assert settings.scorer_options == {"window": 8}
    assert settings.format_options == {"x": 1}


def test_options_join_while_the_plugin_stays_the_same() -> None:
    low = {"scorer": "a", "scorer_options": {"x": 1, "y": 1}}
    assert merge(low, {"scorer_options": {"y": 2}})["scorer_options"] == {"x": 1, "y": 2}
    assert merge(low, {"scorer": "a", "scorer_options": {"y": 2}})["scorer_options"] == {"x": 1, "y": 2}
    assert merge(low, {"scorer": "b", "scorer_options": {"y": 2}})["scorer_options"] == {"y": 2}
    assert "scorer_options" not in merge(low, {"scorer": "b"})
    assert low["scorer_options"] == {"x": 1, "y": 1}


def test_preset_lies_below_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"scorer": "snapkv", "scorer_options": {"window": 9}, "budget": 0.1}
    monkeypatch.setattr(registry, "load_registry", lambda plugins: SimpleNamespace(preset=lambda name: values))
    settings = read_settings({"preset": "p"}, toml(tmp_path, "budget_tokens = 5"))
    assert (settings.scorer, settings.scorer_options) == ("snapkv", {"window": 9})
    assert (settings.budget, settings.budget_tokens) == (None, 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("budgt = 0.1", "unknown key 'budgt' (did you mean 'budget'?)"),
        ('budget = "much"', "$.budget"),
        ("budget = 0.1\nbudget_tokens = 3", "sets both budget and budget_tokens"),
        ('prompt = "a"\nprompt-file = "b"', "sets both prompt and prompt_file"),
        ("budget = = 1", "not valid TOML"),
        ('device = "tpu"', "tpu"),
        ('backend = "numpy"', "numpy"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings({}, toml(tmp_path, text))
    assert words in str(caught.value)
    assert "run.toml" in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration nowhere\.toml"):
        read_settings({}, "nowhere.toml")


def test_two_budgets_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match="the command line sets both budget and budget_bytes"):
        read_settings({"budget": 0.1, "budget_bytes": 3}, None)


def test_compression_config() -> None:
    config = compression_config(RunSettings(budget=0.1, scorer="snapkv", scorer_options={"window": "4"}))
    assert (config.scorer, config.allocator, config.scorer_options) == ("snapkv", "waterfill", {"window": "4"})
    assert (config.backend, compression_config(RunSettings(budget=0.1, backend="torch")).backend) == ("auto", "torch")
    with pytest.raises(ConfigError, match="no budget: give --budget"):
        compression_config(RunSettings())


def test_backends_are_those_that_there_are() -> None:
    assert get_args(BackendName) == ("auto", *NAMES)
    assert list(get_args(BackendName)) == cli_options.BACKENDS
    wrong: Any = "numpy"
    with pytest.raises(ConfigError, match="backend is 'numpy'; it must be one of auto, torch, triton, flashinfer"):
        CompressionConfig(budget=0.1, backend=wrong)


@pytest.mark.parametrize("budget", [0.0, -1.0, 2.0, float("nan"), float("inf")])
def test_bad_budgets_are_not_taken_for_missing_ones(budget: float) -> None:
    with pytest.raises(ConfigError, match="budget is"):
        compression_config(RunSettings(budget=budget))


def test_read_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("grüße", encoding="utf-8")
    assert read_prompt(RunSettings(prompt_file=str(file))) == "grüße"
    assert read_prompt(RunSettings(prompt="")) == ""
    monkeypatch.setattr("sys.stdin", SimpleNamespace(read=lambda: "piped"))
    assert read_prompt(RunSettings(prompt_file="-")) == "piped"


def test_unreadable_prompts(tmp_path: Path) -> None:
    def message(settings: RunSettings) -> str:
        with pytest.raises(ConfigError) as caught:
            read_prompt(settings)
        return str(caught.value)

    (tmp_path / "latin").write_bytes(b"gr\xfc\xdfe")
    assert "not UTF-8 text" in message(RunSettings(prompt_file=str(tmp_path / "latin")))
    assert "No such file" in message(RunSettings(prompt_file=str(tmp_path / "none")))
    assert "no prompt" in message(RunSettings())


def test_settings_cover_the_compression_config() -> None:
    from rdkv.runtime.config import CompressionConfig

    fields: Any = set(CompressionConfig.__struct_fields__)
    assert fields <= set(RunSettings.__struct_fields__)
