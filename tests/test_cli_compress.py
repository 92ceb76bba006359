"""A document compressed once and asked later, as a user does it: ``rdkv compress``, ``generate`` and ``inspect``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rdkv.runtime.cli import run

pytestmark = pytest.mark.usefixtures("own_streams")

ErrorLine = Callable[..., str]
Capture = pytest.CaptureFixture[str]
TEXT = "The quick brown fox jumps over the lazy dog. " * 4
ASK = ["--question", "Who?", "--max-new-tokens", "4", "--device", "cpu"]


@pytest.fixture
def compress(tiny_folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments that save ``doc.rdkv``, and whatever a test adds."""
    prompt = tmp_path / "report.txt"
    prompt.write_text(TEXT)

    def make(*more: str, budget: str | None = "0.3") -> list[str]:
        base = ["compress", "--model", str(tiny_folder), "--prompt-file", str(prompt), "--device", "cpu"]
        out = ["--out", str(tmp_path / "doc.rdkv")]
        return [*base, *out, *([] if budget is None else ["--budget", budget]), *more]

    return make


@pytest.fixture
def file(compress: Callable[..., list[str]], tmp_path: Path, capsys: Capture) -> str:
    """A saved document."""
    assert run(compress()) == 0
    capsys.readouterr()
    return str(tmp_path / "doc.rdkv")


def ask(file: str, capsys: Capture, *more: str) -> Any:
    """The report of an answer."""
    assert run(["generate", "--cache", file, *ASK, "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_it_prints(compress: Callable[..., list[str]], tmp_path: Path, capsys: Capture) -> None:
    assert run(compress()) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    file = tmp_path / "doc.rdkv"
    for words in ("180 read", "retention 2", " prefill, ", " compress, ", f"{file}, {file.stat().st_size:,} bytes"):
        assert words in captured.out
    assert run(compress("--overwrite", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seconds"].keys() == {"prefill", "compress", "save"}
    assert report["cache_bytes"] <= 0.3 * report["full_cache_bytes"]
    assert report["prompt_tokens"] == 180


@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_answers_are_those_of_compress_first(
    compress: Callable[..., list[str]], tiny_folder: Path, tmp_path: Path, capsys: Capture, chat: list[str]
) -> None:
    assert run(compress(*chat)) == 0
    capsys.readouterr()
    found = ask(str(tmp_path / "doc.rdkv"), capsys, *chat)
    direct = ["generate", "--model", str(tiny_folder), "--prompt", TEXT, "--budget", "0.3", "--compress-first", *chat]
    assert run([*direct, *ASK, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    for report in (found, expected):
        del report["seconds"]
    assert found == expected


def test_the_file_names_its_model_and_options(file: str, tiny_folder: Path, capsys: Capture) -> None:
    report = ask(file, capsys)
    assert (report["model"], report["budget"], report["scorer"]) == (str(tiny_folder), 0.3, "attention-distortion")
    assert ask(file, capsys, "--model", str(tiny_folder))["text"] == report["text"]
    assert ask(file, capsys, "--backend", "torch", "--temperature", "1", "--seed", "3")["new_tokens"] == 4


def test_precision_is_that_of_the_file(compress: Callable[..., list[str]], tmp_path: Path, capsys: Capture) -> None:
    assert run(compress("--dtype", "bfloat16")) == 0
    capsys.readouterr()
    assert ask(str(tmp_path / "doc.rdkv"), capsys)["dtype"] == "bfloat16"


def test_settings_of_a_file_serve_every_command(
    tiny_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("report.txt").write_text(TEXT)
    Path("run.toml").write_text(
        f'model = "{tiny_folder}"\nprompt_file = "report.txt"\nout = "doc.rdkv"\nbudget = 0.3\nquestion = "Who?"\n'
        'max-new-tokens = 3\ndevice = "cpu"\njson = true\n'
    )
    assert run(["compress", "--config", "run.toml"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 180
    assert run(["generate", "--config", "run.toml", "--cache", "doc.rdkv"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 3
    assert run(["inspect", "--config", "run.toml", "--cache", "doc.rdkv"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 180


def test_inspect(file: str, capsys: Capture) -> None:
    assert run(["inspect", "--cache", file]) == 0
    out = capsys.readouterr().out
    for words in (file, "float32", "180", "attention-distortion, waterfill, mixed-bit; budget 0.3", "retention 2"):
        assert words in out
    assert "tokens by value width" in out
    assert run(["inspect", "--cache", file, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in report["layers"]] == [0, 1]
    assert sum(row["bytes"] for row in report["layers"]) == report["cache_bytes"] <= 0.3 * report["full_cache_bytes"]


def python_m_rdkv(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rdkv", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_in_processes_of_their_own(tiny_folder: Path, tmp_path: Path) -> None:
    """The prompt comes from standard input, the model from the file, and a damaged file is one line."""
    relative = os.path.relpath(tiny_folder, tmp_path)
    given = ["--model", relative, "--prompt-file", "-", "--budget", "0.3", "--device", "cpu"]
    made = python_m_rdkv("compress", *given, "--out", "doc.rdkv", input=TEXT, cwd=tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    asked = python_m_rdkv("generate", "--cache", str(tmp_path / "doc.rdkv"), *ASK)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert f"{180 + len('Who?') + 2} read, 4 written" in asked.stdout
    whole = (tmp_path / "doc.rdkv").read_bytes()
    (tmp_path / "doc.rdkv").write_bytes(whole[: len(whole) // 2])
    failed = python_m_rdkv("generate", "--cache", "doc.rdkv", *ASK, cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("rdkv: error: doc.rdkv is damaged")
    assert failed.stderr.count("\n") == 1


def test_nothing_is_refused_after_weights_were_read(
    compress: Callable[..., list[str]],
    file: str,
    error_line: ErrorLine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    assert f"{file} exists; give another name, or overwrite it with --overwrite" in error_line(compress())
    assert "there is no folder" in error_line(compress("--out", str(tmp_path / "none" / "doc.rdkv")))
    assert "it is a folder" in error_line(compress("--out", str(tmp_path)))
    assert "no file to save to: give --out" in error_line(["compress", "--prompt", "a", "--budget", "0.3"])
    assert "no budget: give --budget" in error_line(compress("--overwrite", budget=None))
    (tmp_path / "empty.txt").write_text(" \n")
    assert "the prompt is empty" in error_line(compress("--overwrite", "--prompt-file", str(tmp_path / "empty.txt")))
    assert "unknown scorer 'snapvk'" in error_line(compress("--overwrite", "--scorer", "snapvk"))
    generate = ["generate", "--cache", file]
    assert "ask something about it with --question" in error_line(generate)
    for flag in (["--budget", "0.1"], ["--scorer", "snapkv"], ["--format-option", "positions=no"]):
        words = f"{flag[0]} has no effect on a prompt that --cache brings compressed"
        assert words in error_line([*generate, *ASK, *flag])
        assert words in error_line(["inspect", "--cache", file, *flag])
    assert "--png draws scores" in error_line(["inspect", "--cache", file, "--png", "bits.png"])
    assert "leave one of them out" in error_line([*generate, *ASK, "--full-cache"])
    assert "sets both prompt and cache" in error_line([*generate, *ASK, "--prompt", "a"])
    assert "made without the chat template" in error_line([*generate, *ASK, "--chat"])
    assert "max_new_tokens is 0" in error_line([*generate, *ASK, "--max-new-tokens", "0"])


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_files_that_are_none(error_line: ErrorLine, tmp_path: Path, tiny_folder: Path, command: str) -> None:
    assert "cannot read nowhere.rdkv: No such file" in error_line([command, "--cache", "nowhere.rdkv", *ASK])
    for other in (tiny_folder / "model.safetensors", tiny_folder / "config.json"):
        assert "is not a cache that rdkv saved" in error_line([command, "--cache", str(other), *ASK])
    assert "is not a file" in error_line([command, "--cache", str(tmp_path), *ASK])


def test_another_model_or_tokenizer(
    file: str, error_line: ErrorLine, tiny_model: Callable[..., Any], tiny_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tiny_model("llama", seed=1).save_pretrained(other)
    generate = ["generate", "--cache", file, *ASK]
    line = error_line([*generate, "--model", str(other)])
    assert f"{file} was made by another model, {tiny_folder} (weights or configuration differ); use that one" in line
    tiny_model("llama", num_hidden_layers=3).save_pretrained(other)
    assert "this one has 3 layers of 2 KV heads of 16" in error_line([*generate, "--model", str(other)])
    shutil.copytree(tiny_folder, other, dirs_exist_ok=True)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["!"], tokenizer["model"]["vocab"]["?"] = 35, 5
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert f"{file} was made with another tokenizer" in error_line([*generate, "--model", str(other)])
    assert "(--dtype float32)" in error_line([*generate, "--dtype", "bfloat16"])


def test_a_model_that_moved(
    compress: Callable[..., list[str]], tiny_folder: Path, tmp_path: Path, capsys: Capture, error_line: ErrorLine
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "here")
    assert run(compress("--model", str(tmp_path / "here"))) == 0
    capsys.readouterr()
    (tmp_path / "here").rename(tmp_path / "there")
    file = str(tmp_path / "doc.rdkv")
    line = error_line(["generate", "--cache", file, *ASK])
    assert f"(it is the model that {file} names; --model says where it is now)" in line
    assert ask(file, capsys, "--model", str(tmp_path / "there"))["new_tokens"] == 4


FORMAT = """
import rdkv
from rdkv.plugins.rdkv.format import MixedBit
class Own(MixedBit):
    {body}
@rdkv.hookimpl
def rdkv_formats():
    return {{"own": Own}}
"""


def test_formats_of_plugins(
    compress: Callable[..., list[str]], tmp_path: Path, capsys: Capture, error_line: ErrorLine
) -> None:
    plain, plugin = tmp_path / "plain.py", tmp_path / "own.py"
    plain.write_text(FORMAT.format(body="dump = rdkv.CacheFormat.dump"))
    plugin.write_text(FORMAT.format(body="pass"))
    own = ["--format", "own", "--calibration", "none"]
    assert "caches of the format 'own' cannot be saved" in error_line(compress("-p", str(plain), *own))
    assert run(compress("-p", str(plugin), *own)) == 0
    capsys.readouterr()
    file = str(tmp_path / "doc.rdkv")
    line = error_line(["generate", "--cache", file, *ASK])
    assert "unknown format 'own'; known: mixed-bit; install the plugin that packed it, or load it with -p" in line
    assert f"(it was made with -p {plugin})" in line
    assert ask(file, capsys, "-p", str(plugin))["format"] == "own"
