"""One line and exit code 2 for everything that a user can get wrong; nothing swallowed for anything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rdkv.runtime import cli_generate
from rdkv.runtime.cli import run

pytestmark = pytest.mark.usefixtures("own_streams")

Arguments = Callable[..., list[str]]
ErrorLine = Callable[..., str]

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
        (["--tail-block", "8"], "0.1", "tail_block is 8; it must be at least 64"),
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
    error_line: ErrorLine, arguments: Arguments, more: list[str], budget: str | None, words: str
) -> None:
    assert words in error_line(arguments(*more, budget=budget))


def test_prompt_is_required(error_line: ErrorLine, tiny_folder: Path) -> None:
    assert "no prompt" in error_line(["generate", "--model", str(tiny_folder), "--budget", "0.1"])
    assert "no model" in error_line(["generate", "--prompt", "a", "--budget", "0.1"])
    assert "no model" in error_line(["calibrate"])


def test_unknown_config_key(error_line: ErrorLine, arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("scorr = 'snapkv'\n")
    line = error_line(arguments("--config", str(tmp_path / "run.toml")))
    assert "run.toml: unknown key 'scorr' (did you mean 'scorer'?)" in line


def test_corrupt_gguf(error_line: ErrorLine, arguments: Arguments, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(range(64)))
    assert "corrupt or truncated GGUF" in error_line(arguments("--model", str(path)))


@pytest.mark.parametrize(
    "change",
    ["token = token[..., 1:]", "token[..., 0] = float('nan')", "token[..., 0] = float('inf')", "token[..., 0] = -1.0"],
)
def test_bad_scorer(error_line: ErrorLine, arguments: Arguments, tmp_path: Path, change: str) -> None:
    (tmp_path / "plugin.py").write_text(BAD_PLUGIN.format(name="Bad", change=change))
    line = error_line(arguments("-p", str(tmp_path / "plugin.py"), "--scorer", "bad"))
    assert "bad" in line
    assert "layer 0" in line


def test_overspending_allocator(error_line: ErrorLine, arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text(GREEDY_ALLOCATOR)
    line = error_line(arguments("-p", str(tmp_path / "plugin.py"), "--allocator", "greedy"))
    assert "greedy" in line
    assert "layer 0" in line


def test_plugin_that_fails_to_import(error_line: ErrorLine, arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module_at_all\n")
    assert "no_such_module_at_all" in error_line(arguments("-p", str(tmp_path / "broken.py")))


def test_duplicate_name(error_line: ErrorLine, arguments: Arguments, tmp_path: Path) -> None:
    source = BAD_PLUGIN.format(name="Bad", change="pass").replace('"bad"', '"snapkv"')
    (tmp_path / "plugin.py").write_text(source)
    assert "'snapkv'" in error_line(arguments("-p", str(tmp_path / "plugin.py")))


def test_nothing_is_refused_after_weights_were_read(
    error_line: ErrorLine, arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(*_: object, **__: object) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", weights)
    for more in (["--scorer", "snapvk"], ["--prompt", " "], ["--top-p", "3"], ["--allocator-option", "x=1"]):
        error_line(arguments(*more))


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], arguments: Arguments, tmp_path: Path) -> None:
    assert run(arguments("--scorer", "snapvk", "--debug")) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("rdkv: error: unknown scorer")
    (tmp_path / "run.toml").write_text("debug = true\n")
    assert run(arguments("--scorer", "snapvk", "--config", str(tmp_path / "run.toml"))) == 2
    assert "Traceback" in capsys.readouterr().err


def test_unexpected_errors_are_not_swallowed(
    error_line: ErrorLine, arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(cli_generate, "generate", fail)
    line = error_line(arguments(), code=1)
    assert "ZeroDivisionError: division by zero" in line
    assert "--debug" in line


def test_usage_errors(capsys: pytest.CaptureFixture[str], error_line: ErrorLine) -> None:
    assert "genrate" in error_line(["genrate"])
    assert run([]) == 2
    assert "Commands:" in "".join(capsys.readouterr())
