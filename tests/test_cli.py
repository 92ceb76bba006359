"""The command line: what its commands print."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rdkv import __version__
from rdkv.runtime.cli import run
from rdkv.runtime.engine import batch

TEXT = "The quick brown fox jumps over the lazy dog. " * 4
pytestmark = pytest.mark.usefixtures("own_streams")

Arguments = Callable[..., list[str]]
ErrorLine = Callable[..., str]
# Scores that are not numbers: refused by the first layer, far into a run.
BAD_PLUGIN = """
import rdkv, torch
class Bad(rdkv.Scorer):
    def score(self, observation):
        nothing = float("nan") * observation.keys.float()
        return rdkv.Scores(nothing[..., 0], nothing[:, :, 0])
@rdkv.hookimpl
def rdkv_scorers():
    return {"bad": Bad}
"""


def test_generate_prints_the_answer_and_what_it_took(capsys: pytest.CaptureFixture[str], arguments: Arguments) -> None:
    assert run(arguments()) == 0
    out = capsys.readouterr().out
    for words in ("180 read, 4 written", "retention 2", "tokens by value bits", "channels by key bits", "prefill"):
        assert words in out


def test_generate_json(capsys: pytest.CaptureFixture[str], arguments: Arguments) -> None:
    assert run(arguments("--json", "--question", "Who?", "--scorer-option", "window=8")) == 0
    report = json.loads(capsys.readouterr().out)
    required = {
        "text",
        "prompt_tokens",
        "new_tokens",
        "retention",
        "cache_bytes",
        "full_cache_bytes",
        "bits",
        "seconds",
    }
    assert required <= report.keys()
    assert report["bits"].keys() == {"value", "key"}
    assert report["seconds"].keys() == {"prefill", "compress", "decode"}
    assert report["cache_bytes"] <= 0.3 * report["full_cache_bytes"]


@pytest.mark.parametrize("budget", [["--budget-tokens", "40"], ["--budget-bytes", "9000"], ["--full-cache"]])
def test_other_budgets(capsys: pytest.CaptureFixture[str], arguments: Arguments, budget: list[str]) -> None:
    assert run(arguments("--json", *budget, budget=None)) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["retention"] == 1.0) == (budget == ["--full-cache"])
    if budget[0] == "--budget-bytes":
        assert report["cache_bytes"] <= 9000


@pytest.mark.parametrize(("flags", "blocks"), [(["--tail-block", "64"], 2), (["--tail-block", "0"], 0), ([], 0)])
def test_long_answers_in_blocks(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch, flags: list[str], blocks: int
) -> None:
    compressed, original = [], batch.compress_oldest

    def counted(*more: Any) -> None:
        compressed.append(more)
        original(*more)

    monkeypatch.setattr(batch, "compress_oldest", counted)
    assert run(arguments("--max-new-tokens", "200", "--seed", "1", "--temperature", "1", *flags)) == 0
    assert len(compressed) == blocks


def test_config_file(capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f'model = "{tiny_folder}"\nprompt = "{TEXT}"\nmax-new-tokens = 2\nscorer = "snapkv"\nbudget = 0.2\n'
        'allocator = "eviction"\njson = true\ndevice = "cpu"\n[scorer-options]\nwindow = 8\n'
    )
    assert run(["generate", "--config", str(file), "--budget", "0.4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["scorer"], report["allocator"], report["budget"], report["new_tokens"]) == (
        "snapkv", "eviction", 0.4, 2,
    )  # fmt: skip


def test_preset(capsys: pytest.CaptureFixture[str], arguments: Arguments) -> None:
    assert run(arguments("--preset", "rdkv-paper", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["retention"] <= 0.3


def test_inspect(capsys: pytest.CaptureFixture[str], arguments: Arguments, tmp_path: Path) -> None:
    png = tmp_path / "bits.png"
    assert run(arguments("--png", str(png), command="inspect")) == 0
    out = capsys.readouterr().out
    assert "tokens by value width" in out
    assert png.read_bytes().startswith(b"\x89PNG")
    assert run(arguments("--png", str(png), "--json", command="inspect")) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in report["layers"]] == [0, 1]
    for row in report["layers"]:
        assert sum(row["values"].values()) == pytest.approx(1.0)
        assert sum(row["keys"].values()) == pytest.approx(1.0)
        assert row["kept"] == pytest.approx(1.0 - row["values"].get("0", 0.0))
    whole = sum(row["bytes"] for row in report["layers"]) / (180 * 2 * 2 * 16 * 2 * 2)
    assert report["retention"] == pytest.approx(whole)


def test_inspect_cannot_write(error_line: ErrorLine, arguments: Arguments, tmp_path: Path) -> None:
    missing = tmp_path / "no" / "folder.png"
    assert str(missing) in error_line(arguments("--png", str(missing), command="inspect"))
    assert "nothing to inspect" in error_line(arguments("--full-cache", command="inspect", budget=None))


def test_plugins_lists_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins"]) == 0
    out = capsys.readouterr().out
    for name in (
        "attention-distortion", "snapkv", "key-norm", "streaming", "expected-attention", "random",
        "waterfill", "eviction", "quantization", "mixed-bit", "rdkv-paper",
    ):  # fmt: skip
        assert f"{name} " in out


def test_plugins_lists_backends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run(["plugins"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.strip().split(maxsplit=2)[1:] for line in lines[-5:] if line}
    assert rows["torch"][0] == "yes"
    assert rows["triton"] == rows["flashinfer"] == ["no", "needs a CUDA device"]
    assert lines[-1] == "`--backend auto` takes torch on this machine (cpu)."


def test_backend(capsys: pytest.CaptureFixture[str], error_line: ErrorLine, arguments: Arguments) -> None:
    assert run(arguments("--backend", "torch", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 4
    assert "'numpy' is not one of 'auto', 'torch', 'triton', 'flashinfer'" in error_line(
        arguments("--backend", "numpy")
    )


def test_plugins_describes_one(capsys: pytest.CaptureFixture[str], error_line: ErrorLine) -> None:
    assert run(["plugins", "attention-distortion"]) == 0
    out = capsys.readouterr().out
    for words in ("scorer from rdkv", "window", "int, at least 1", "default", "--scorer-option"):
        assert words in out
    assert run(["plugins", "rdkv-paper"]) == 0
    assert "smoothing" in capsys.readouterr().out
    assert "did you mean 'snapkv'?" in error_line(["plugins", "snapvk"])


def test_calibration_is_found_by_the_next_run(
    capsys: pytest.CaptureFixture[str], error_line: ErrorLine, arguments: Arguments, tiny_folder: Path, rdkv_home: Path
) -> None:
    model = ["--model", str(tiny_folder), "--device", "cpu"]
    assert run(["calibrate", *model, "--tokens", "400", "--prompts", "1", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["tokens"] == 396
    assert [len(row) for row in made["heads"]] == [2, 2]
    (file,) = (rdkv_home / "calibration").iterdir()
    assert json.loads(file.read_bytes()) == made
    assert run(["calibrate", *model, "--tokens", "400", "--prompts", "1"]) == 0
    out = capsys.readouterr().out
    assert str(file) in out
    assert "bytes of each layer" in out
    assert "--prompts 0" in error_line(["calibrate", *model, "--tokens", "128"])
    capsys.readouterr()
    bits = []
    for by in ("head", "layer", "even"):
        assert run(arguments("--budget-by", by, "--json")) == 0
        bits.append(json.loads(capsys.readouterr().out)["bits"]["value"])
    assert bits[0] != bits[1] != bits[2] != bits[0]
    file.write_text("damaged")
    assert "is not a calibration file" in error_line(arguments())
    assert run(arguments("--calibration", "none")) == 0


def python_m_rdkv(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rdkv", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_as_a_module(arguments: Arguments, tmp_path: Path) -> None:
    assert python_m_rdkv("--version").stdout.strip() == f"rdkv, version {__version__}"
    # Far into a run, so that every library has had its chance to print a warning or a progress bar.
    (tmp_path / "plugin.py").write_text(BAD_PLUGIN)
    failed = python_m_rdkv(*arguments("-p", str(tmp_path / "plugin.py"), "--scorer", "bad"))
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith("rdkv: error: ")
    assert failed.stderr.count("\n") == 1


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from rdkv.runtime.cli import run; run(['--help']); assert 'torch' not in sys.modules"
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert time.perf_counter() - begin < 10  # 0.1 s on an idle machine
    for command in ("generate", "compress", "inspect", "plugins", "calibrate"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["generate", "compress", "inspect", "plugins", "calibrate"])
def test_help_of_commands(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run([command, "--help"]) == 0
    assert "--debug" in capsys.readouterr().out
