"""Sweeps: the grid, what makes a cell, and that a killed run goes on without losing or repeating one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import rdkv
from bench.quality.cells import Cells, read_cells
from bench.quality.evaluate import Kinds
from bench.quality.method import Method, Ours
from bench.quality.sample import PROTOCOLS
from bench.quality.sweep import Ticks, Work, run
from bench.quality.tasks import Catalogue, Source
from rdkv.runtime.calibration import python_reference
from rdkv.runtime.loading import LoadedModel

ROOT = Path(__file__).resolve().parents[1]
METHODS: list[Method] = [Ours("ours"), Ours("evicting", {"allocator": "eviction"})]


@pytest.fixture
def work(tiny_model: Callable[..., Any], tiny_tokenizer: PreTrainedTokenizerFast) -> Work:
    loaded = LoadedModel("tiny", tiny_model(max_position_embeddings=2048), tiny_tokenizer, "cpu", "float32")
    catalogue = Catalogue(Source(python_reference()), None, length=900, samples=2)
    samples = [sample for task in ("passkey_retrieval", "text") for sample in catalogue.make(tiny_tokenizer, task)]
    return Work(loaded, samples, METHODS, [0.2, 0.4], PROTOCOLS, Kinds(reference_tokens=8, answer_tokens=2))


class Counted(Ticks):
    def __init__(self) -> None:
        self.total, self.done, self.steps, self.whats = 0, 0, 0, list[str]()

    def start(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def step(self, cells: int, what: str) -> None:
        self.steps += cells
        self.whats.append(what)


def identities(path: Path) -> list[tuple[Any, ...]]:
    names = ("task", "index", "protocol", "method", "budget")
    return [tuple(record[name] for name in names) for record in read_cells(path)]


def test_every_cell_once(work: Work, tmp_path: Path) -> None:
    path, ticks = tmp_path / "cells.jsonl", Counted()
    with Cells(path) as cells:
        assert run(work, cells, ticks) == 30
    found = identities(path)
    # Two samples of a task that asks in two protocols, and of one that asks nothing; the full cache and 2 x 2 cells.
    assert len(found) == len(set(found)) == 2 * (2 + 1) * (1 + 2 * 2) == ticks.total == ticks.steps
    assert {place[2] for place in found if place[0] == "text"} == {"seen"}
    record = next(read_cells(path))
    assert {
        "device",
        "torch",
        "half",
        "seed",
        "sample",
        "bytes",
        "kl",
        "key",
        "settings",
        "reference_tokens",
    } <= record.keys()
    assert work.loaded.model.config._attn_implementation != "rdkv"
    again = Counted()
    with Cells(path) as cells:
        assert run(work, cells, again) == 0
    assert (again.total, again.done, again.steps) == (30, 30, 0)


def test_a_sample_is_in_every_table_before_the_next_one(work: Work, tmp_path: Path) -> None:
    with Cells(tmp_path / "cells.jsonl") as cells:
        run(work, cells, Ticks())
    indices = [place[1] for place in identities(tmp_path / "cells.jsonl")]
    assert indices == sorted(indices)


def test_a_wider_grid_adds_only_what_is_new(work: Work, tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    with Cells(path) as cells:
        run(replace(work, methods=METHODS[:1], budgets=[0.2]), cells, Ticks())
        assert run(work, cells, Ticks()) == 30 - 12
        # Other settings under the same name, other lengths of answers: other cells.
        assert run(replace(work, methods=[Ours("ours", {"scorer": "snapkv"})]), cells, Ticks()) == 12
        assert run(replace(work, methods=[], kinds=Kinds(reference_tokens=4, answer_tokens=2)), cells, Ticks()) == 6
    assert len({record["key"] for record in read_cells(path)}) == 30 + 12 + 6


def test_batches_give_what_single_prompts_give(work: Work, tmp_path: Path) -> None:
    """Rows of equal length together: the same cells, and scores within rounding."""
    found: list[dict[tuple[Any, ...], dict[str, Any]]] = []
    for size in (1, 4):
        path = tmp_path / f"{size}.jsonl"
        with Cells(path) as cells:
            run(replace(work, batch=size), cells, Ticks())
        found.append(dict(zip(identities(path), read_cells(path), strict=True)))
    single, batched = found
    assert single.keys() == batched.keys()
    for place, record in single.items():
        assert batched[place]["kl"] == pytest.approx(record["kl"], abs=2e-3)
        assert batched[place]["key"] == record["key"]


def test_time_is_up(work: Work, tmp_path: Path) -> None:
    with Cells(tmp_path / "cells.jsonl") as cells:
        assert run(work, cells, Ticks(), seconds=-1.0) == 0


def test_an_error_leaves_the_model_as_it_was(work: Work, tmp_path: Path) -> None:
    bad: list[Method] = [Ours("bad", {"scorer": "nobody"})]
    with Cells(tmp_path / "cells.jsonl") as cells, pytest.raises(rdkv.ConfigError, match="nobody"):
        run(replace(work, methods=bad), cells, Ticks())
    assert work.loaded.model.config._attn_implementation != "rdkv"
    assert len(identities(tmp_path / "cells.jsonl")) == 1  # the full cache, which came first


def test_killed_and_started_again(tiny_folder: Path, tmp_path: Path) -> None:
    """``kill -9`` in the middle; the file that the second run ends with is the one of a run that nobody killed."""
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(
        'scorers = ["attention-distortion", "snapkv"]\nbudgets = [0.2, 0.4, 0.6]\ntasks = ["passkey_retrieval"]\n'
        'samples = 4\nlength = 420\nreference_tokens = 4\nanswer_tokens = 2\ndevice = "cpu"\n'
    )
    command = [sys.executable, "-m", "bench.quality.ablation", "--sweep", str(sweep), "--model", str(tiny_folder)]
    path = tmp_path / "killed" / "cells.jsonl"
    process = subprocess.Popen(
        [*command, "--out", str(path.parent)], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    assert 3 <= kept.count(b"\n") < 56
    with path.open("ab") as file:
        file.write(b'{"key": "torn')
    whole = tmp_path / "whole"
    for out in (path.parent, whole):
        done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(kept)
    assert len(identities(path)) == len(set(identities(path))) == 4 * 2 * (1 + 2 * 3)
    figures = [{k: v for k, v in json.loads(line).items() if k != "compress_seconds"} for line in path.open()]
    expected = [{k: v for k, v in r.items() if k != "compress_seconds"} for r in read_cells(whole / "cells.jsonl")]
    assert figures == expected
