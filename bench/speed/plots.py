"""The figures of docs/performance.md, from the records of the engine.

    python -m bench.speed.plots bench/results/*.jsonl --folder docs/figures

Where a case was measured more than once the last record counts. Records of one machine: the last that was measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .table import read

Record = dict[str, Any]
WAYS = {
    "transformers": ("transformers, full cache", "#8c8c8c"),
    "full": ("this engine, full 16-bit cache", "#d98032"),
    "ours": ("this engine, compressed", "#2a6fbb"),
    "floor": ("weights alone", "#2f2f2f"),
}
GIB = 1 << 30


def chosen(records: list[Record]) -> list[Record]:
    """The engine's records of the last machine and model, one for each length and batch."""
    found = [record for record in records if record["kind"] == "engine"]
    last = [r for r in found if all(r[name] == found[-1][name] for name in ("device", "layers", "budget"))]
    return list({(r["tokens"], r["batch"]): r for r in last}.values())


def by_length(axes: Axes, records: list[Record], name: str, unit: float) -> None:
    """A line for each way, over the prompt's length, of one sequence."""
    single = sorted((r for r in records if r["batch"] == 1), key=lambda r: r["tokens"])
    for way, (label, colour) in WAYS.items():
        points = [(r["tokens"], r[f"{way}_{name}"] / unit) for r in single if f"{way}_{name}" in r]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label, color=colour)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the prompt")
    axes.set_xticks([r["tokens"] for r in single], [f"{r['tokens'] // 1024}K" for r in single])
    axes.minorticks_off()


def step(axes: Axes, records: list[Record]) -> None:
    """Milliseconds a token."""
    by_length(axes, records, "ms", 1.0)
    axes.set(ylabel="ms a token", title="One sequence: time per output token")
    axes.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])


def memory(axes: Axes, records: list[Record]) -> None:
    """Peak memory of decoding."""
    by_length(axes, records, "decode_peak_bytes", GIB)
    axes.set(ylabel="GiB", title="One sequence: peak memory of decoding")
    axes.set_yticks([16, 24, 32, 48], ["16", "24", "32", "48"])


def throughput(axes: Axes, records: list[Record]) -> None:
    """Tokens a second of the largest batch of each length that was measured, full caches and compressed ones."""
    lengths = sorted({r["tokens"] for r in records if r["batch"] > 1})
    for place, tokens in enumerate(lengths):
        for shift, way in ((-0.2, "full"), (0.2, "ours")):
            found = [r for r in records if r["tokens"] == tokens and f"{way}_ms" in r]
            if not found:
                continue
            best = max(found, key=lambda r: r["batch"])
            rate = 1000 * best["batch"] / best[f"{way}_ms"]
            label, colour = WAYS[way]
            axes.bar(place + shift, rate, 0.38, color=colour, label=label if place == 0 else None)
            axes.annotate(f"{rate:,.0f}\n(batch {best['batch']})", (place + shift, rate), ha="center", va="bottom")
    axes.set_xticks(range(len(lengths)), [f"{tokens // 1024}K" for tokens in lengths])
    axes.set(ylabel="tokens a second", xlabel="tokens of each prompt", title="Many sequences: throughput")
    axes.margins(y=0.2)


FIGURES: dict[str, Callable[[Axes, list[Record]], None]] = {"step": step, "memory": memory, "throughput": throughput}


def draw(records: list[Record], folder: Path) -> list[Path]:
    """One SVG file for each of `FIGURES`, the same bytes for the same records."""
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    found = chosen(records)
    for name, fill in FIGURES.items():
        with mpl.rc_context(
            {"svg.hashsalt": name, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
        ):
            figure = Figure(figsize=(6.0, 3.6), layout="constrained")
            axes = figure.subplots()
            fill(axes, found)
            axes.grid(axis="y", alpha=0.3)
            handles, labels = axes.get_legend_handles_labels()
            if handles:
                axes.legend(handles, labels, fontsize=8)
            paths.append(folder / f"engine-{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
    return paths


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    for path in draw(read(arguments.results), arguments.folder):
        print(path)


if __name__ == "__main__":
    main()
