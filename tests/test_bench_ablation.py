"""The command: settings from flags and files, methods by name, mistakes in one line, and the smoke sweep's report."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.quality import ablation, methods
from bench.quality.cells import read_cells
from bench.quality.method import Ours
from bench.quality.settings import Settings, settings_from
from rdkv.runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "bench" / "quality" / "smoke.toml"


def test_grid() -> None:
    made = methods.grid(["snapkv", "random"], ["waterfill:scope=head,key_share=0.5"], [])
    assert [method.name for method in made] == [
        "snapkv + waterfill:scope=head,key_share=0.5", "random + waterfill:scope=head,key_share=0.5",
    ]  # fmt: skip
    assert made[1].settings == {
        "scorer": "random", "allocator": "waterfill", "allocator_options": {"scope": "head", "key_share": "0.5"},
    }  # fmt: skip
    assert methods.grid([], [], []) == []
    assert methods.grid([], ["eviction"], []) == [Ours("eviction", {"allocator": "eviction"})]
    with pytest.raises(ConfigError, match="is not NAME:option=value"):
        methods.grid(["snapkv:32"], [], [])


def test_named_and_presets(tmp_path: Path) -> None:
    (paper,) = methods.named({"mine": {"preset": "rdkv-paper", "calibration": "auto"}})
    assert paper.name == "mine"
    assert paper.settings["calibration"] == "auto"
    assert paper.settings["scorer_options"]["smoothing"] == 5
    file = ROOT / "bench" / "quality" / "presets.toml"
    assert len(methods.read_methods(file)) > 20
    assert [m.name for m in methods.read_methods(file, ["eviction-only", "default"])] == ["eviction-only", "default"]
    with pytest.raises(ConfigError, match="did you mean 'eviction-only'"):
        methods.read_methods(file, ["eviction-onyl"])
    with pytest.raises(ConfigError, match="cannot read methods"):
        methods.read_methods(tmp_path / "none.toml")


def test_every_method_of_the_file_is_sound(tiny_model: Any) -> None:
    methods.check(methods.read_methods(ROOT / "bench" / "quality" / "presets.toml"), tiny_model().config, [0.1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "no methods"),
        ([Ours("a"), Ours("a")], "two methods are called 'a'"),
        ([Ours("full")], "call the method otherwise"),
        ([Ours("a", {"scorer": "snapvk"})], "method 'a': unknown scorer 'snapvk'.*did you mean 'snapkv'"),
        ([Ours("a", {"scorers": "snapkv"})], "method 'a': configuration"),
        ([Ours("a", {"scorer_options": {"window": 0}})], "method 'a'.*window"),
    ],
)
def test_mistakes_in_methods(wrong: list[Any], message: str, tiny_model: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.check(wrong, tiny_model().config, [0.1])


def test_flags_and_file_have_the_same_settings(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text('samples = 3\nbudgets = [0.1, 1]\nhalf = "tune"\n[methods.a]\nscorer = "snapkv"\n')
    flags = ["--sweep", str(file), "--samples", "5", "--tasks", "vt", "cwe", "--answer-tokens", "7", "--seconds", "2.5"]
    settings, report_only = ablation.parse(flags)
    assert not report_only
    assert (settings.samples, settings.budgets, settings.half, settings.tasks) == (5, (0.1, 1), "tune", ("vt", "cwe"))
    assert (settings.answer_tokens, settings.seconds, settings.methods) == (7, 2.5, {"a": {"scorer": "snapkv"}})
    assert settings.model == Settings().model
    with pytest.raises(ConfigError, match="unknown field `sampels`"):
        settings_from({"sampels": 3})


def test_help_tells_of_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ablation.parse(["--help"])
    text = capsys.readouterr().out
    for name in Settings.__struct_fields__:
        assert name == "methods" or f"--{name.replace('_', '-')}" in text
    assert "{tune,report,both}" in text


def test_mistakes_are_one_line(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--model", str(tiny_folder), "--device", "cpu", "--out", str(tmp_path)]
    for flags, message in (
        (["--scorers", "snapvk"], "did you mean 'snapkv'"),
        (["--scorers", "snapkv", "--tasks", "vtt"], "did you mean 'vt'"),
        ([], "no methods"),
        (["--report-only"], "cannot read the results"),
        (["--sweep", str(tmp_path / "none.toml")], "cannot read the configuration"),
        (["--scorers", "snapkv", "--samples", "0"], "no samples"),
    ):
        assert ablation.main([*base, *flags]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert re.match("ablation: error: .*" + message, lines[0]), lines


@pytest.mark.parametrize("target", ["ablation", "ablation-smoke"])
def test_make(target: str) -> None:
    """What make would run, and that every variable arrives."""
    variables = ["MODEL=m", "SCORERS=a b", "ALLOCATORS=c", "BUDGETS=0.1 0.2", "TASKS=vt", "OUT=o", "ARGS=--half tune"]
    done = subprocess.run(["make", "-n", target, *variables], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = re.findall(r"-m bench\.quality\.ablation (.*)", done.stdout.replace("\\\n", " "))
    settings, _ = ablation.parse(line.split())
    assert settings.half == "tune"
    if target == "ablation":
        assert (settings.model, settings.scorers, settings.allocators) == ("m", ("a", "b"), ("c",))
        assert (settings.budgets, settings.tasks, settings.out) == ((0.1, 0.2), ("vt",), "o")


def test_smoke(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sweep of ``make ablation-smoke`` with a tiny model, for whose tokens labels are too long."""
    flags = ["--sweep", str(SMOKE), "--model", str(tiny_folder), "--out", str(tmp_path), "--tasks", "text"]
    assert ablation.main(flags) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "report.md"), str(tmp_path / "report.html")]
    cells = list(read_cells(tmp_path / "cells.jsonl"))
    assert len(cells) == 2 * (1 + 3 * 2)
    assert {cell["method"] for cell in cells} == {
        "full", "attention-distortion + waterfill", "attention-distortion + eviction", "rdkv-paper",
    }  # fmt: skip
    assert all(cell["retention"] <= cell["budget"] for cell in cells)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 1 + 2 + 6
    assert "rdkv-paper" in html
