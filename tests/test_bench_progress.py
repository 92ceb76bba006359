"""What is told while a sweep runs, on a terminal and elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from bench.quality.progress import Bar


def told(terminal: bool, done: int = 0) -> str:
    stream = io.StringIO()
    with Bar(Console(file=stream, force_terminal=terminal, width=160)) as bar:
        bar.start(10, done)
        for _ in range(10 - done):
            bar.step(1, "labels, seen: ours at 5%")
    return stream.getvalue()


def test_lines_without_a_terminal() -> None:
    lines = told(terminal=False).splitlines()
    assert len(lines) == 2  # the first cell and the last; between them one every half minute
    assert lines[0].startswith("1/10 cells, ")
    assert lines[1].endswith(" 0 s left: labels, seen: ours at 5%")


def test_a_bar_on_a_terminal() -> None:
    assert "10/10" in told(terminal=True)
    assert "4 of 10 cells are there already" in told(terminal=True, done=4)
