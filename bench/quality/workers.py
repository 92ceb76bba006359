"""A sweep in several processes: tasks are dealt out, and their cells gathered in one file."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

import msgspec
import torch

from rdkv.runtime.errors import ConfigError, RdkvError
from rdkv.runtime.loading import resolve_source

from .cells import Cells, read_cells
from .settings import Settings
from .sweep import Ticks, run

FILES = "worker-*.jsonl"  # beside the file of all cells, until a sweep ends
Message = tuple[str, int, Any]


def sweep(settings: Settings, ticks: Ticks) -> None:
    """Measure in ``settings.workers`` processes what the folder's cells lack.

    What they have measured is kept, however it ends.

    Raises:
        ConfigError: a mistake in the settings, or a process that died.
        ModelLoadError: no such model.
    """
    folder = Path(settings.out)
    with Cells(folder / "cells.jsonl") as cells:
        gather(folder, cells)  # of a sweep that was interrupted
        tasks = settings.catalogue.resolve(settings.tasks)
        resolve_source(settings.model)  # a GGUF file is converted here, and not by every worker
        count = min(settings.workers, len(tasks))
        shares = [msgspec.structs.replace(settings, tasks=tuple(tasks[i::count]), workers=1) for i in range(count)]
        threads = max(1, (os.cpu_count() or 1) // count)
        context = multiprocessing.get_context("spawn")
        queue: Queue[Message] = context.Queue()
        processes: list[BaseProcess] = [
            context.Process(target=_work, args=(share, i, threads, cells.done, queue), daemon=True)
            for i, share in enumerate(shares)
        ]
        try:
            for process in processes:
                process.start()
            _listen(processes, queue, ticks)
        finally:
            for process in processes:
                process.terminate()
                process.join()
            gather(folder, cells)


def gather(folder: Path, cells: Cells) -> None:
    """Add the cells of workers' files to those of all, and remove the files."""
    for path in sorted(folder.glob(FILES)):
        unknown = {record["key"]: record for record in read_cells(path) if record["key"] not in cells.done}
        cells.add(list(unknown.values()))
        path.unlink()


class _Told(Ticks):
    """Sends what it hears to the parent."""

    def __init__(self, worker: int, queue: Queue[Message]) -> None:
        self._worker, self._queue = worker, queue

    def start(self, total: int, done: int) -> None:
        self._queue.put(("start", self._worker, (total, done)))

    def step(self, cells: int, what: str) -> None:
        self._queue.put(("step", self._worker, (cells, what)))


def _work(settings: Settings, worker: int, threads: int, done: set[str], queue: Queue[Message]) -> None:
    """One process: a model of its own, and its part of the processor."""
    torch.set_num_threads(threads)
    try:
        with Cells(Path(settings.out) / FILES.replace("*", str(worker))) as cells:
            cells.done |= done
            run(settings.work(), cells, _Told(worker, queue), settings.seconds or float("inf"))
    except RdkvError as error:
        queue.put(("error", worker, str(error)))
    except KeyboardInterrupt:
        pass
    queue.put(("end", worker, None))


def _listen(processes: list[BaseProcess], queue: Queue[Message], ticks: Ticks) -> None:
    """Pass on what workers say until all have ended; what they do before all have begun is told then."""
    totals: dict[int, tuple[int, int]] = {}
    early: list[tuple[int, str]] = []
    for kind, worker, told in _messages(processes, queue):
        if kind == "error":
            raise ConfigError(told)
        if kind == "start":
            totals[worker] = told
            if len(totals) == len(processes):
                ticks.start(sum(total for total, _ in totals.values()), sum(done for _, done in totals.values()))
                for step in early:
                    ticks.step(*step)
        elif len(totals) < len(processes):
            early.append(told)
        else:
            ticks.step(*told)


def _messages(processes: list[BaseProcess], queue: Queue[Message]) -> Iterator[Message]:
    ended = 0
    while ended < len(processes):
        try:
            message = queue.get(timeout=1.0)
        except Empty:
            if died := [process for process in processes if process.exitcode]:
                raise ConfigError(f"a worker ended with code {died[0].exitcode}; was there enough memory?") from None
            continue
        if message[0] == "end":
            ended += 1
        else:
            yield message
