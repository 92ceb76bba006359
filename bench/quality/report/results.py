"""Records of a sweep, by protocol, method and budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .stats import Estimate, Prompt, Values, difference, estimate

Record = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A figure of a record: its field, its name, whether more is better, and how it is written."""

    field: str
    name: str
    higher: bool
    digits: int = 3


METRICS = (
    Metric("accuracy", "token accuracy", True),
    Metric("agreement", "agreement", True),
    Metric("kl", "KL", False),
    Metric("nll", "NLL", False),
    Metric("score", "task score", True),
)


@dataclass(frozen=True)
class Point:
    """A method at a budget, in one protocol."""

    protocol: str
    method: str
    budget: float


class Results:
    """What a report is made of.

    Args:
        records: of ``cells.jsonl``.
        half: keep the samples of this half, or of ``both``.
    """

    def __init__(self, records: Iterable[Record], half: str = "both") -> None:
        self.half = half
        self.records = [record for record in records if half in ("both", record["half"])]
        self._points: dict[Point, dict[Prompt, Record]] = {}
        for record in self.records:
            point = Point(record["protocol"], record["method"], record["budget"])
            self._points.setdefault(point, {})[record["task"], record["index"], record["seed"]] = record

    @cached_property
    def protocols(self) -> list[str]:
        """In order: the question seen, the question after."""
        return sorted({record["protocol"] for record in self.records}, key=("seen", "after").index)

    @cached_property
    def methods(self) -> list[str]:
        """In the order in which they were measured, the full cache left out; the first one is the reference."""
        return [name for name in dict.fromkeys(record["method"] for record in self.records) if name != "full"]

    @cached_property
    def budgets(self) -> list[float]:
        """Ascending."""
        return sorted({record["budget"] for record in self.records if record["method"] != "full"})

    @cached_property
    def tasks(self) -> list[str]:
        """By name."""
        return sorted({record["task"] for record in self.records})

    @cached_property
    def metrics(self) -> list[Metric]:
        """Those that were measured."""
        return [metric for metric in METRICS if any(metric.field in record for record in self.records)]

    def distinct(self, field: str) -> list[Any]:
        """The different values of a field."""
        return list(dict.fromkeys(record[field] for record in self.records if field in record))

    def rows(self, point: Point, task: str | None = None) -> dict[Prompt, Record]:
        """Records of a point by prompt, of one task or of all."""
        found = self._points.get(point, {})
        return {prompt: row for prompt, row in found.items() if task in (None, prompt[0])}

    def values(self, point: Point, field: str, task: str | None = None) -> Values:
        """A figure of every prompt that has it."""
        return {prompt: row[field] for prompt, row in self.rows(point, task).items() if field in row}

    def estimate(self, point: Point, field: str, task: str | None = None) -> Estimate | None:
        """The figure's mean and interval."""
        return estimate(self.values(point, field, task))

    def difference(self, point: Point, reference: Point, field: str) -> Estimate | None:
        """What a point has more than a reference, on prompts that both have."""
        return difference(self.values(point, field), self.values(reference, field))

    def retention(self, point: Point) -> float | None:
        """Share of the full cache's bytes really held, over all prompts together."""
        rows = [row for row in self.rows(point).values() if row["fits"]]
        return sum(row["bytes"] for row in rows) / sum(row["full_bytes"] for row in rows) if rows else None

    def mean_map(self, point: Point, field: str) -> Any:
        """Mean over prompts of a table or of shares, where records have it; None if none has."""
        tables = [row[field] for row in self.rows(point).values() if field in row]
        if not tables:
            return None
        if isinstance(tables[0], dict):
            return mean_shares(tables)
        return [[sum(cell) / len(cell) for cell in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]


def mean_shares(tables: list[dict[str, float]]) -> dict[str, float]:
    """Mean share of each width, the narrow ones first and pinned tokens last."""
    order: Callable[[str], int] = lambda width: int(width) if width.isdigit() else 99  # noqa: E731
    widths = sorted({width for table in tables for width in table}, key=order)
    return {width: sum(table.get(width, 0.0) for table in tables) / len(tables) for width in widths}


def full(protocol: str) -> Point:
    """The full cache."""
    return Point(protocol, "full", 1.0)
