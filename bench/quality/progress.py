"""How a sweep goes: a bar with the time that is left, or a line now and then where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .sweep import Ticks

EVERY = 30.0  # seconds between lines where there is no terminal


class Bar(Ticks):
    """Shows cells done, time spent, time left, and what was measured last."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            BarColumn(), MofNCompleteColumn(), TextColumn("cells"), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False), TextColumn("{task.description}"), console=console,
            disable=not console.is_terminal, speed_estimate_period=600,
        )  # fmt: skip

    def start(self, total: int, done: int) -> None:
        """See `Ticks.start`; cells of an earlier run do not count as fast ones."""
        self.total, self.done, self.begin, self.said, self.new = total, done, time.monotonic(), 0.0, 0
        self.task = self.progress.add_task("reading", total=total, completed=done)
        if done:
            self.console.print(f"{done} of {total} cells are there already", highlight=False)

    def step(self, cells: int, what: str) -> None:
        """See `Ticks.step`."""
        self.done, self.new = self.done + cells, self.new + cells
        self.progress.update(self.task, advance=cells, description=what)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.said > EVERY or self.done == self.total):
            left = (now - self.begin) / self.new * (self.total - self.done)
            self.console.print(f"{self.done}/{self.total} cells, {left:.0f} s left: {what}", highlight=False)
            self.said = now

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
