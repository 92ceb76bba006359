"""What the README shows runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from rdkv.runtime.cli import run

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
COMMAND = re.compile("rdkv (generate|compress|inspect|plugins|calibrate) ")
COMMANDS = [line for line in README.splitlines() if COMMAND.match(line)]


def test_python_blocks(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {"name": str(tiny_folder), "text": "The quick brown fox jumps over the lazy dog. " * 4}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, namespace)
    figures = re.search(r"^(\d+) (\d+) (\d\.\d+) tensor", capsys.readouterr().out, re.MULTILINE)
    assert figures is not None
    assert int(figures[1]) < int(figures[2])
    assert 0 < float(figures[3]) <= 0.05
    answers = namespace["engine"].generate(namespace["questions"], after=namespace["document"])
    assert [len(answer.tokens) for answer in answers] == [64, 64]


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines(
    line: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    for command in [other for other in COMMANDS if "--cache" in line and "--out" in other] + [line]:
        words = shlex.split(command, comments=True)[1:]
        arguments = [str(tiny_folder) if word == "smollm2-135m" else word for word in words]
        assert run(arguments) == 0
    assert capsys.readouterr().out


def test_it_opens_with_the_two_commands() -> None:
    head = README.split("```")[1]
    assert head.index("make demo") < head.index("make test")


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).resolve().parents[1] / target).exists(), target
