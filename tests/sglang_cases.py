"""Cases of SGLang on a tiny model, each an engine in a process of its own, some at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ON_GPU = torch.cuda.is_available()
ENGINES = 5 if ON_GPU else 2  # at once
SECONDS = 400  # that an engine may take; a loaded machine needs a minute to import SGLang


@dataclass(frozen=True)
class Case:
    """What an engine is started with, and what it is asked.

    Attributes:
        engine: arguments of ``sglang.Engine``; environment: variables of its processes.
        spread: most seconds between two requests; 0 sends all at once.
        abort: requests to abort once the one of the key is sent.
    """

    prompts: list[list[int]]
    new: list[int]
    engine: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    spread: float = 0.0
    abort: dict[int, list[int]] = field(default_factory=dict)

    def run(self, model: Path) -> dict[str, Any]:
        """The report of `sglang_engine`."""
        engine = {"model_path": str(model), **self.engine}
        case = {"prompts": self.prompts, "new": self.new, "engine": engine, "spread": self.spread, "abort": self.abort}
        standins = None if ON_GPU else str(HERE / "standins")  # for what is compiled for GPUs alone
        path = os.pathsep.join(filter(None, [standins, os.environ.get("PYTHONPATH")]))
        variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        variables |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **self.environment}
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "report.json"
            command = [sys.executable, str(HERE / "sglang_engine.py"), json.dumps(case), str(result)]
            done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=SECONDS, check=False)
            assert result.exists(), done.stdout[-3000:] + done.stderr[-6000:]
            report: dict[str, Any] = json.loads(result.read_text())
            report["log"] = done.stdout + done.stderr
            return report


class Reports(Mapping[str, dict[str, Any]]):
    """Reports of cases by name, which run some at a time; one that failed raises where it is asked for."""

    def __init__(self, cases: dict[str, Case], model: Path) -> None:
        self._pool = ThreadPoolExecutor(ENGINES)
        self._reports = {name: self._pool.submit(case.run, model) for name, case in cases.items()}

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self._reports[name].result()

    def __iter__(self) -> Iterator[str]:
        return iter(self._reports)

    def __len__(self) -> int:
        return len(self._reports)

    def close(self) -> None:
        """Wait for those that run; the others do not begin."""
        self._pool.shutdown(cancel_futures=True)
