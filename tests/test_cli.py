"""The command line: what it prints, and one line with exit code 2 for everything that a user can get wrong."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rdkv import __version__
from rdkv.runtime import cli, cli_generate
from rdkv.runtime.cli import run

TEXT = "The quick brown fox jumps over the lazy dog. " * 4
BAD_PLUGIN = """
import rdkv, torch
class {name}(rdkv.Scorer):
    def score(self, observation):
        b, h, t, d = observation.keys.shape
        token, channel = torch.ones(b, h, t), torch.ones(b, h, d)
        {change}
        return rdkv.Scores(token, channel)
@rdkv.hookimpl
def rdkv_scorers():
    return {{"bad": {name}}}
"""
GREEDY_ALLOCATOR = """
import rdkv, torch
class Greedy(rdkv.Allocator):
    def allocate(self, scores, ladder, budget):
        bits = torch.full_like(scores.token, 16, dtype=torch.uint8)
        keys = torch.full_like(scores.channel, 16, dtype=torch.uint8)
        return rdkv.BitPlan(bits, keys, torch.zeros_like(bits, dtype=torch.bool))
@rdkv.hookimpl
def rdkv_allocators():
    return {"greedy": Greedy}
"""

Arguments = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def own_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in this process must leave the libraries' warnings, and pytest's streams, to other tests."""
    monkeypatch.setattr(cli, "silence_libraries", lambda: None)
    logging.getLogger("rdkv").handlers.clear()


@pytest.fixture
def arguments(tiny_folder: Path) -> Arguments:
    """``generate`` with a tiny model, a prompt and a budget, and whatever a test adds."""

    def make(*more: str, command: str = "generate", prompt: str = TEXT, budget: str | None = "0.3") -> list[str]:
        base = [command, "--model", str(tiny_folder), "--prompt", prompt, "--max-new-tokens", "4", "--device", "cpu"]
        return [*base, *([] if budget is None else ["--budget", budget]), *more]

    return make


def error_line(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    """The one line that a failing command prints."""
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("rdkv: error: ")
    return lines[0]


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


def test_inspect_cannot_write(capsys: pytest.CaptureFixture[str], arguments: Arguments, tmp_path: Path) -> None:
    missing = tmp_path / "no" / "folder.png"
    assert str(missing) in error_line(capsys, arguments("--png", str(missing), command="inspect"))
    assert "nothing to inspect" in error_line(capsys, arguments("--full-cache", command="inspect", budget=None))


def test_plugins_lists_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins"]) == 0
    out = capsys.readouterr().out
    for name in (
        "attention-distortion", "snapkv", "key-norm", "streaming", "expected-attention", "random",
        "waterfill", "eviction", "quantization", "mixed-bit", "rdkv-paper",
    ):  # fmt: skip
        assert f"{name} " in out


def test_plugins_describes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins", "attention-distortion"]) == 0
    out = capsys.readouterr().out
    for words in ("scorer from rdkv", "window", "int, at least 1", "default", "--scorer-option"):
        assert words in out
    assert run(["plugins", "rdkv-paper"]) == 0
    assert "smoothing" in capsys.readouterr().out
    assert "did you mean 'snapkv'?" in error_line(capsys, ["plugins", "snapvk"])


def test_calibration_is_found_by_the_next_run(
    capsys: pytest.CaptureFixture[str], arguments: Arguments, tiny_folder: Path, rdkv_home: Path
) -> None:
    model = ["--model", str(tiny_folder), "--device", "cpu"]
    assert run(["calibrate", *model, "--tokens", "128", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["tokens"] == 124
    (file,) = (rdkv_home / "calibration").iterdir()
    assert json.loads(file.read_bytes()) == made
    assert run(["calibrate", *model, "--tokens", "128"]) == 0
    assert str(file) in capsys.readouterr().out
    file.write_text("damaged")
    assert "is not a calibration file" in error_line(capsys, arguments())
    assert run(arguments("--calibration", "none")) == 0


@pytest.mark.parametrize(
    ("more", "budget", "words"),
    [
        ([], "0", "budget is 0.0"),
        ([], "-1", "budget is -1.0"),
        ([], "2", "budget is 2.0"),
        ([], "nan", "budget is nan"),
        ([], "much", "'much' is not a valid float"),
        ([], None, "no budget"),
        (["--budget-tokens", "0"], None, "budget_tokens is 0"),
        (["--budget-bytes", "0"], None, "budget_bytes is 0"),
        (["--allocator", "quantization"], "0.01", "allocator 'quantization'"),
        (["--budget-tokens", "5"], "0.1", "sets both budget and budget_tokens"),
        (["--scorer", "snapvk"], "0.1", "unknown scorer 'snapvk' (did you mean 'snapkv'?)"),
        (["--allocator", "waterfil"], "0.1", "did you mean 'waterfill'?"),
        (["--format", "mixed-bits"], "0.1", "did you mean 'mixed-bit'?"),
        (["--preset", "rdkv-papr"], "0.1", "did you mean 'rdkv-paper'?"),
        (["--scorer-option", "windw=3"], "0.1", "did you mean 'window'?"),
        (["--scorer-option", "window"], "0.1", "is not of the form name=value"),
        (["--scorer-option", "window=wide"], "0.1", "window"),
        (["--prompt", ""], "0.1", "the prompt is empty"),
        (["--prompt", "a" * 600], "0.1", "the prompt has 600 tokens, but the model's window is 512"),
        (["--max-new-tokens", "0"], "0.1", "max_new_tokens is 0"),
        (["--temperature", "-1"], "0.1", "temperature is -1.0"),
        (["--compress-first"], "0.1", "there is no question"),
        (["--model", "./nowhere"], "0.1", "no such folder or file"),
        (["-p", "rdkv_no_such_plugin"], "0.1", "rdkv_no_such_plugin"),
        (["--bugdet", "1"], "0.1", "--bugdet"),
        (["--config", "nowhere.toml"], "0.1", "nowhere.toml"),
        (["--calibration", "nowhere.json"], "0.1", "nowhere.json"),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str], arguments: Arguments, more: list[str], budget: str | None, words: str
) -> None:
    assert words in error_line(capsys, arguments(*more, budget=budget))


def test_prompt_is_required(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> None:
    assert "no prompt" in error_line(capsys, ["generate", "--model", str(tiny_folder), "--budget", "0.1"])
    assert "no model" in error_line(capsys, ["generate", "--prompt", "a", "--budget", "0.1"])
    assert "no model" in error_line(capsys, ["calibrate"])


def test_unknown_config_key(capsys: pytest.CaptureFixture[str], arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("scorr = 'snapkv'\n")
    line = error_line(capsys, arguments("--config", str(tmp_path / "run.toml")))
    assert "run.toml: unknown key 'scorr' (did you mean 'scorer'?)" in line


def test_corrupt_gguf(capsys: pytest.CaptureFixture[str], arguments: Arguments, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(range(64)))
    assert "corrupt or truncated GGUF" in error_line(capsys, arguments("--model", str(path)))


@pytest.mark.parametrize(
    "change",
    ["token = token[..., 1:]", "token[..., 0] = float('nan')", "token[..., 0] = float('inf')", "token[..., 0] = -1.0"],
)
def test_bad_scorer(capsys: pytest.CaptureFixture[str], arguments: Arguments, tmp_path: Path, change: str) -> None:
    (tmp_path / "plugin.py").write_text(BAD_PLUGIN.format(name="Bad", change=change))
    line = error_line(capsys, arguments("-p", str(tmp_path / "plugin.py"), "--scorer", "bad"))
    assert "bad" in line
    assert "layer 0" in line


def test_overspending_allocator(capsys: pytest.CaptureFixture[str], arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text(GREEDY_ALLOCATOR)
    line = error_line(capsys, arguments("-p", str(tmp_path / "plugin.py"), "--allocator", "greedy"))
    assert "greedy" in line
    assert "layer 0" in line


def test_plugin_that_fails_to_import(capsys: pytest.CaptureFixture[str], arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module_at_all\n")
    assert "no_such_module_at_all" in error_line(capsys, arguments("-p", str(tmp_path / "broken.py")))


def test_duplicate_name(capsys: pytest.CaptureFixture[str], arguments: Arguments, tmp_path: Path) -> None:
    source = BAD_PLUGIN.format(name="Bad", change="pass").replace('"bad"', '"snapkv"')
    (tmp_path / "plugin.py").write_text(source)
    assert "'snapkv'" in error_line(capsys, arguments("-p", str(tmp_path / "plugin.py")))


def test_nothing_is_refused_after_weights_were_read(
    capsys: pytest.CaptureFixture[str], arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(*_: object, **__: object) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", weights)
    for more in (["--scorer", "snapvk"], ["--prompt", " "], ["--top-p", "3"], ["--allocator-option", "x=1"]):
        error_line(capsys, arguments(*more))


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], arguments: Arguments, tmp_path: Path) -> None:
    assert run(arguments("--scorer", "snapvk", "--debug")) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("rdkv: error: unknown scorer")
    (tmp_path / "run.toml").write_text("debug = true\n")
    assert run(arguments("--scorer", "snapvk", "--config", str(tmp_path / "run.toml"))) == 2
    assert "Traceback" in capsys.readouterr().err


def test_unexpected_errors_are_not_swallowed(
    capsys: pytest.CaptureFixture[str], arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(cli_generate, "generate", fail)
    line = error_line(capsys, arguments(), code=1)
    assert "ZeroDivisionError: division by zero" in line
    assert "--debug" in line


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert "genrate" in error_line(capsys, ["genrate"])
    assert run([]) == 2
    assert "Commands:" in "".join(capsys.readouterr())


def python_m_rdkv(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rdkv", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_as_a_module(arguments: Arguments, tmp_path: Path) -> None:
    assert python_m_rdkv("--version").stdout.strip() == f"rdkv, version {__version__}"
    # Far into a run, so that every library has had its chance to print a warning or a progress bar.
    (tmp_path / "plugin.py").write_text(BAD_PLUGIN.format(name="Bad", change="token[0, 0, 0] = float('nan')"))
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
    for command in ("generate", "inspect", "plugins", "calibrate"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["generate", "inspect", "plugins", "calibrate"])
def test_help_of_commands(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert run([command, "--help"]) == 0
    assert "--debug" in capsys.readouterr().out
