"""Figures of the engine's records: what is drawn, and that the same records give the same bytes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.speed import plots
from bench.speed.table import read

ROOT = Path(__file__).resolve().parents[1]
BASE: dict[str, Any] = {"kind": "engine", "device": "a GPU", "layers": 2, "budget": 0.05}
RECORDS = [
    BASE | {"tokens": 4096, "batch": 1, "ours_ms": 9.0},
    BASE | {"tokens": 4096, "batch": 1, "ours_ms": 5.0, "full_ms": 6.0, "transformers_ms": 60.0, "floor_ms": 4.9,
            "ours_decode_peak_bytes": 17 << 30},
    BASE | {"tokens": 32768, "batch": 1, "ours_ms": 5.5, "full_ms": 8.0},
    BASE | {"tokens": 32768, "batch": 8, "ours_ms": 16.0},
    BASE | {"tokens": 32768, "batch": 4, "full_ms": 8.0},
    BASE | {"tokens": 32768, "batch": 2, "full_ms": 1.0, "device": "another"},
    {"kind": "gemv", "device": "a GPU"},
    BASE | {"tokens": 32768, "batch": 2, "full_ms": 2.0},
]  # fmt: skip


def test_the_last_record_of_a_case_and_machine_counts() -> None:
    found = plots.chosen(RECORDS)
    assert {record["device"] for record in found} == {"a GPU"}
    cases = [(4096, 1), (32768, 1), (32768, 2), (32768, 4), (32768, 8)]
    assert sorted((r["tokens"], r["batch"]) for r in found) == cases
    assert next(r for r in found if r["tokens"] == 4096)["ours_ms"] == 5.0


def test_figures(tmp_path: Path) -> None:
    first, second = (plots.draw(RECORDS, tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in first] == ["engine-step.svg", "engine-memory.svg", "engine-throughput.svg"]
    for path, again in zip(first, second, strict=True):
        assert path.read_bytes() == again.read_bytes()
        assert path.read_text().startswith("<?xml")


def test_throughput_is_of_the_largest_batch() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    plots.throughput(axes, plots.chosen(RECORDS))
    assert [text.get_text() for text in axes.texts] == ["500\n(batch 4)", "500\n(batch 8)"]


def test_figures_of_the_page_are_of_its_records(tmp_path: Path) -> None:
    """Not their bytes, which depend on the version of matplotlib: only that each is there and shown."""
    page = (ROOT / "docs" / "performance.md").read_text()
    for path in plots.draw(read((ROOT / "bench" / "results").glob("engine-*.jsonl")), tmp_path):
        assert (ROOT / "docs" / "figures" / path.name).exists()
        assert f"(figures/{path.name})" in page
