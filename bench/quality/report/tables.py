"""The tables of a report, as text cells: Markdown and HTML write the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .results import Metric, Point, Results, full, prompt_of
from .stats import Estimate

PROTOCOL_NAMES = {"seen": "question seen by the compression", "after": "question asked after compression"}

FEWEST = 6  # pairs for a difference to be called one: fewer have no bootstrap to speak of
PAIRED = (
    "Differences on the same prompts. A bold one is better (in red, or with †, worse) by an interval that leaves out "
    f"zero, over at least {FEWEST} pairs."
)


@dataclass
class Table:
    """Rows of cells under a head; ``strong`` are rows that stand out, ``best`` and ``worse`` cells (row, column)."""

    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    strong: set[int] = field(default_factory=set)
    best: set[tuple[int, int]] = field(default_factory=set)
    worse: set[tuple[int, int]] = field(default_factory=set)
    note: str = ""


def summary(results: Results, protocol: str, task: str | None = None) -> Table:
    """Every method at every budget: bytes, and each metric with its interval, the best of a budget standing out."""
    metrics = [m for m in results.metrics if results.estimate(full(protocol), m.field, task)]
    where = "all tasks" if task is None else task
    table = Table(
        f"{where}, {PROTOCOL_NAMES[protocol]}", ["method", "budget", "bytes", *(m.name for m in metrics), "n"]
    )
    _add(table, results, full(protocol), metrics, task, "full cache")
    table.strong = {0}
    for budget in results.budgets:
        first = len(table.rows)
        means: list[list[float | None]] = []
        for method in results.methods:
            point = Point(protocol, method, budget)
            if results.rows(point, task):
                _add(table, results, point, metrics, task, method)
                found = [results.estimate(point, m.field, task) for m in metrics]
                means.append([None if one is None else one.mean for one in found])
        for column, metric in enumerate(metrics):
            known = [row[column] for row in means]
            table.best |= {(first + row, 3 + column) for row in best_rows(known, metric.higher)}
    return table


def best_rows(values: list[float | None], higher: bool) -> list[int]:
    """Which values are best, if there is something to choose between."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return []
    best = max(known) if higher else min(known)
    if all(value == best for value in known):
        return []
    return [row for row, value in enumerate(values) if value == best]


def _add(table: Table, results: Results, point: Point, metrics: list[Metric], task: str | None, name: str) -> None:
    rows = list(results.rows(point, task).values())
    fitting = [row for row in rows if row["fits"]]
    budget = "" if point.method == "full" else f"{100 * point.budget:g}%"
    if not fitting:
        table.rows.append([name, budget, "does not fit", *("" for _ in metrics), str(len(rows))])
        return
    full_bytes = sum(row["full_bytes"] for row in fitting)
    held = f"{100 * sum(row['bytes'] for row in fitting) / full_bytes:.2f}%"
    if any("allocated_bytes" in row for row in fitting):  # a mask, or zeros, where bytes were to be freed
        allocated = sum(row.get("allocated_bytes", row["bytes"]) for row in fitting)
        held += f" ({100 * allocated / full_bytes:.0f}% allocated)"
    cells = [written(results.estimate(point, metric.field, task), metric.digits) for metric in metrics]
    count = str(len(fitting)) if len(fitting) == len(rows) else f"{len(fitting)} of {len(rows)}"
    table.rows.append([name, budget, held, *cells, count])


def paired(results: Results, protocol: str) -> Table:
    """Every method beside the first one at the same budget, on the prompts that both have."""
    reference = results.methods[0]
    metrics = [m for m in results.metrics if m.field != "nll"]
    table = Table(
        f"difference from {reference}, {PROTOCOL_NAMES[protocol]}",
        ["method", "budget", *(f"Δ {m.name}" for m in metrics), "pairs"],
        note=PAIRED,
    )
    for budget in results.budgets:
        for method in results.methods[1:]:
            point, base = Point(protocol, method, budget), Point(protocol, reference, budget)
            found = [results.difference(point, base, m.field) for m in metrics]
            if not any(found):
                continue
            for column, (one, metric) in enumerate(zip(found, metrics, strict=True), 2):
                if one is not None and one.n >= FEWEST and one.beyond_zero:
                    place = table.best if (one.mean > 0) == metric.higher else table.worse
                    place.add((len(table.rows), column))
            cells = [written(one, m.digits, sign=True) for one, m in zip(found, metrics, strict=True)]
            pairs = max(one.n for one in found if one is not None)
            table.rows.append([method, f"{100 * budget:g}%", *cells, str(pairs)])
    return table


def share_of_full(results: Results, protocol: str) -> Table:
    """Token accuracy and task score as a share of the full cache's, a row a method and a column a budget."""
    fields = [m for m in results.metrics if m.field in ("accuracy", "score")]
    head = ["method", *(f"{m.name} at {100 * b:g}%" for m in fields for b in results.budgets)]
    table = Table(f"share of the full cache's, {PROTOCOL_NAMES[protocol]}", head)
    for method in results.methods:
        row = [method]
        for metric in fields:
            whole = results.estimate(full(protocol), metric.field)
            for budget in results.budgets:
                one = results.estimate(Point(protocol, method, budget), metric.field)
                row.append(f"{100 * one.mean / whole.mean:.1f}%" if one and whole and whole.mean else "")
        table.rows.append(row)
    return table


def overview(results: Results) -> Iterator[Table]:
    """The tables over all tasks."""
    for protocol in results.protocols:
        yield summary(results, protocol)
        yield share_of_full(results, protocol)
        if len(results.methods) > 1:
            yield paired(results, protocol)


def by_task(results: Results) -> Iterator[Table]:
    """A table for each task and protocol."""
    for task in results.tasks:
        for protocol in results.protocols:
            if results.rows(full(protocol), task):
                yield summary(results, protocol, task)


def conditions(results: Results) -> list[tuple[str, str]]:
    """What was measured, on what: names and values."""
    kinds = {
        "model": "model", "dtype": "dtype", "device": "device", "seeds": "seed", "torch": "torch",
        "transformers": "transformers", "python": "python",
    }  # fmt: skip
    found = [(name, ", ".join(map(str, results.distinct(key)))) for name, key in kinds.items()]
    lengths = sorted(record["compressed_tokens"] for record in results.records)
    different = len({prompt_of(record) for record in results.records})
    return [
        *found,
        ("half", "both" if results.half == "both" else f"{results.half} only"),
        (
            "prompts",
            f"{different} of {len(results.tasks)} tasks, {lengths[0]} to {lengths[-1]} tokens",
        ),
        ("cells", str(len(results.records))),
        ("intervals", "95% bootstrap, prompts drawn anew within each task, 2000 draws"),
    ]


def written(one: Estimate | None, digits: int, sign: bool = False) -> str:
    """``mean [low, high]``."""
    if one is None:
        return ""
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{one.mean:{form}} [{one.low:{form}}, {one.high:{form}}]"
