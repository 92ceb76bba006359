"""A sweep in two processes: the cells of one process, each once, whatever is left from an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.quality import ablation, workers
from bench.quality.cells import Cells, read_cells
from rdkv.runtime.errors import ConfigError

SAME = ("key", "method", "budget", "task", "index", "bytes", "accuracy")


def flags(model: Path, out: Path, count: int, *more: str) -> list[str]:
    base = ["--model", str(model), "--device", "cpu", "--out", str(out), "--workers", str(count), "--scorers", "snapkv"]
    base += ["--budgets", "0.3", "--scores", "forced", "--samples", "2", "--length", "500", "--protocols", "seen"]
    return [*base, "--tasks", "text", "passkey_retrieval", *more]


def figures(out: Path) -> list[tuple[Any, ...]]:
    """Cells by their keys; KL to what other numbers of threads do not change."""
    cells = read_cells(out / "cells.jsonl")
    return sorted((*(record[name] for name in SAME), round(record["kl"], 4)) for record in cells)


def test_two_processes_measure_what_one_does(tiny_folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert ablation.main(flags(tiny_folder, one, 1)) == 0
    two.mkdir()
    lines = (one / "cells.jsonl").read_text().splitlines(keepends=True)
    (two / "cells.jsonl").write_text(lines[0])
    (two / "worker-7.jsonl").write_text("".join(lines[:3]) + '{"key": "torn')  # of a sweep that was interrupted
    assert ablation.main(flags(tiny_folder, two, 2)) == 0
    assert figures(two) == figures(one)
    assert len(figures(two)) == 2 * 2 * 2
    assert not list(two.glob("worker-*"))
    assert (two / "report.md").exists()


def test_a_mistake_is_told(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablation.main(flags(tiny_folder, tmp_path, 2, "--samples", "0")) == 2
    assert "no samples" in capsys.readouterr().err


def test_the_model_is_there_before_workers_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or each of them would convert a GGUF file."""
    monkeypatch.setattr(workers.multiprocessing, "get_context", None)
    assert ablation.main(flags(tmp_path / "none", tmp_path, 2)) == 2
    assert "no such folder" in capsys.readouterr().err


class Ended:
    exitcode = -9


class Silent:
    """A queue that nothing comes from."""

    def get(self, timeout: float) -> Any:
        raise workers.Empty


def test_a_worker_that_died_is_told() -> None:
    with pytest.raises(ConfigError, match="ended with code -9"):
        list(workers._messages([Ended()], Silent()))  # type: ignore[list-item, arg-type]


def test_gather_adds_each_cell_once(tmp_path: Path) -> None:
    rows = [{"key": str(i), "model": "m", "dtype": "d"} for i in range(4)]
    (tmp_path / "worker-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    (tmp_path / "worker-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
    with Cells(tmp_path / "cells.jsonl") as cells:
        cells.add(rows[:1])
        workers.gather(tmp_path, cells)
    assert [row["key"] for row in read_cells(tmp_path / "cells.jsonl")] == ["0", "1", "2", "3"]
