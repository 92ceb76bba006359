"""The charts of a report, each as an SVG to be put into the page."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .results import Metric, Point, Results, full
from .tables import PROTOCOL_NAMES

# Okabe and Ito's colours, which the colour-blind tell apart, and two more; methods beyond them differ by line and mark.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5d4e9c", "#7a7a7a")
LINES, MARKS = ("-", "--", ":"), "osD^vPX*"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4", "axes.edgecolor": "#888888",
    "axes.axisbelow": True, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "svg.hashsalt": "rdkv",
}  # fmt: skip
WIDTHS = {"0": "#eceff1", "2": "#a6cee3", "4": "#4a90c2", "8": "#1f4e8c", "16": "#0b1f3f", "pinned": "#e69f00"}


def pareto(results: Results, protocol: str) -> str:
    """Quality against true bytes: a panel a metric, a curve a method, with 95% intervals."""
    metrics = [m for m in results.metrics if m.field in ("accuracy", "kl", "score") and _measured(results, protocol, m)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.3 * len(metrics), 3.9), layout="constrained")
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for panel, metric in zip(panels, metrics, strict=True):
            for number, method in enumerate(results.methods):
                _curve(panel, results, protocol, method, metric, number)
            whole = results.estimate(full(protocol), metric.field)
            if metric.higher and whole is not None:
                panel.axhline(whole.mean, color="#333333", linewidth=1, linestyle=(0, (6, 3)), label="full cache")
            _axes(panel, results, metric)
        handles, names = panels[0].get_legend_handles_labels()
        for panel in panels[1:]:
            for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
                if name not in names:
                    handles, names = [*handles, handle], [*names, name]
        figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)), frameon=False)
        return svg(figure, f"Quality against bytes, {PROTOCOL_NAMES[protocol]}")


def _measured(results: Results, protocol: str, metric: Metric) -> bool:
    return results.estimate(full(protocol), metric.field) is not None


def _curve(panel: Any, results: Results, protocol: str, method: str, metric: Metric, number: int) -> None:
    points = [Point(protocol, method, budget) for budget in results.budgets]
    found = [(results.retention(point), results.estimate(point, metric.field)) for point in points]
    known = sorted((100 * held, one) for held, one in found if held is not None and one is not None)
    if not known:
        return
    bytes_held, means = [x for x, _ in known], [one.mean for _, one in known]
    spread = [[max(0.0, one.mean - one.low) for _, one in known], [max(0.0, one.high - one.mean) for _, one in known]]
    colour, line = COLOURS[number % len(COLOURS)], LINES[number // len(COLOURS) % len(LINES)]
    panel.errorbar(
        bytes_held, means, yerr=spread, color=colour, linestyle=line, marker=MARKS[number % len(MARKS)], markersize=5,
        linewidth=1.7, elinewidth=0.9, capsize=2, label=method,
    )  # fmt: skip


def _axes(panel: Any, results: Results, metric: Metric) -> None:
    panel.set_xscale("log")
    ticks = [100 * budget for budget in results.budgets]
    panel.set_xticks(ticks, [f"{tick:g}%" for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel("bytes held, of the full cache's")
    panel.set_title(metric.name + (" (more is better)" if metric.higher else ", nats (less is better)"))
    if metric.higher:
        panel.set_ylim(bottom=0, top=panel.get_ylim()[1] * 1.02)
    else:
        values = [one for line in panel.get_lines() for one in line.get_ydata() if one > 0]
        if values and max(values) / min(values) > 8:
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)


def histogram(results: Results, protocol: str, field: str) -> str | None:
    """Share of tokens (``value_bits``) or channels (``key_bits``) at each width, a bar a method and budget."""
    bars: list[tuple[float, str, dict[str, float]]] = []
    for method in results.methods:
        below = bars[-1][0] + 1.5 if bars else 0.0  # a gap between methods
        for budget in results.budgets:
            shares = results.mean_map(Point(protocol, method, budget), field)
            if shares is not None:
                bars.append((below, f"{method}  {100 * budget:g}%", shares))
                below += 1
    if not bars:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 1.0 + 0.24 * bars[-1][0]), layout="constrained")
        panel = figure.subplots()
        panel.grid(visible=False)
        places = [place for place, _, _ in bars]
        left = [0.0] * len(bars)
        for width, colour in WIDTHS.items():
            shares = [100 * bar.get(width, 0.0) for _, _, bar in bars]
            if any(shares):
                name = {"0": "0 bits", "pinned": "pinned, 16"}.get(width, width)
                panel.barh(places, shares, left=left, color=colour, height=0.78, label=name)
                left = [a + b for a, b in zip(left, shares, strict=True)]
        panel.set_yticks(places, [name for _, name, _ in bars])
        panel.invert_yaxis()
        panel.set_xlim(0, 100)
        what = "tokens, by bits of their values" if field == "value_bits" else "key channels, by bits"
        panel.set_xlabel(f"% of {what}")
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False)
        return svg(figure, f"Histogram of {what}, {PROTOCOL_NAMES[protocol]}")


def heat_maps(results: Results, protocol: str, method: str, budget: float) -> str | None:
    """Mean value bits of a token, by layer and head and by layer and position."""
    point = Point(protocol, method, budget)
    heads, positions = results.mean_map(point, "heads"), results.mean_map(point, "positions")
    if heads is None or positions is None:
        return None
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        wide = max(2.2, min(6.0, 0.3 * len(heads[0]) + 1.5))
        figure = Figure(figsize=(wide + 5.4, max(2.6, min(5.2, 0.11 * len(heads) + 1.3))), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[wide - 0.9, 5.0])
        _map(figure, left, heads, "KV head", [str(head) for head in range(len(heads[0]))])
        left.set_title("by head")
        _map(figure, right, positions, "position in the prompt", None)
        right.set_title("by position")
        left.set_ylabel("layer")
        return svg(figure, f"Bits of {method} at {100 * budget:g}%, {PROTOCOL_NAMES[protocol]}")


def _map(figure: Any, panel: Any, table: Sequence[Sequence[float]], name: str, ticks: list[str] | None) -> None:
    flat = [value for row in table for value in row]
    # One outlier, such as the part with the pinned first tokens, must not take all of the scale.
    top = max(sorted(flat)[int(0.97 * (len(flat) - 1))], 1e-3)
    image = panel.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
    panel.set_xlabel(name)
    if ticks is None:
        panel.set_xticks([-0.5, len(table[0]) / 2 - 0.5, len(table[0]) - 0.5], ["start", "middle", "end"])
    elif len(ticks) <= 16:
        panel.set_xticks(range(len(ticks)), ticks)
    extend = "max" if max(flat) > top else "neither"
    bar = figure.colorbar(image, ax=panel, extend=extend, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.set_title("bits", fontsize=9, fontweight="normal", loc="left")


def svg(figure: Figure, title: str) -> str:
    """The figure as an ``<svg>`` element that scales with the page; ids are its own."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'preserveAspectRatio="xMinYMin meet"', text, count=1)
    mark = f"c{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{mark}-", text)
