"""The documentation runs: Python blocks of a page in order, in one namespace, and ``rdkv plugins`` lines."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Line number and text of each fenced block of ``language``."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start(2)].count("\n"), m[2]) for m in FENCE.finditer(text) if m[1] == language]


def save_files(page: Path, folder: Path) -> None:
    """Write the blocks that begin with a comment naming a file, as the reader is told to."""
    for _, code in blocks(page, "python"):
        if name := FILE.match(code):
            (folder / name[1]).write_text(code, encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code_blocks = blocks(page, "python")
    if not code_blocks:
        pytest.skip("no Python blocks")
    save_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    # A module of its own, in sys.modules: msgspec resolves annotations of classes there.
    module = type(sys)("docs_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    namespace: dict[str, Any] = vars(module)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for line, code in code_blocks:
            # Newlines in front, so that a traceback shows the page's own line.
            exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_console_lines_about_plugins(page: Path, tmp_path: Path) -> None:
    lines = [line for _, block in blocks(page, "console") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("rdkv plugins")]
    if not commands:
        pytest.skip("no rdkv plugins lines")
    save_files(page, tmp_path)
    environment = {**os.environ, "COLUMNS": "200"}
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert command[-1] in done.stdout


def test_links_lead_somewhere() -> None:
    pages = [*PAGES, ROOT / "examples" / "rdkv-example-plugin" / "README.md"]
    for page in pages:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_plugin_page_has_what_it_promises() -> None:
    page = ROOT / "docs" / "plugins.md"
    assert page in PAGES
    names = [FILE.match(code) for _, code in blocks(page, "python")]
    assert [name[1] for name in names if name] == ["value_attention.py", "top_tokens.py", "half.py"]
