"""Reports: estimates and differences by the book, tables that say what was measured, one HTML file without errands."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.quality.report import charts, html, markdown, write_reports
from bench.quality.report.heat import heat_maps
from bench.quality.report.results import Point, Results, full
from bench.quality.report.stats import difference, estimate
from bench.quality.report.tables import best_rows, by_task, overview, paired, summary
from bench.quality.sample import half_of
from rdkv.runtime.errors import ConfigError

METHODS, BUDGETS, TASKS = ("ours", "worse"), (0.05, 0.1), ("labels", "text")


def record(method: str, budget: float, task: str, index: int, protocol: str = "seen", **more: Any) -> dict[str, Any]:
    base = {"full": 0.9, "ours": 0.8, "worse": 0.5}[method] + 0.01 * index
    made = {
        "model": "tiny <model>", "dtype": "float32", "device": "cpu", "torch": "2", "transformers": "5", "python": "3",
        "method": method, "budget": budget, "task": task, "index": index, "seed": 0, "protocol": protocol,
        "half": half_of(task, index, 0), "compressed_tokens": 100, "sample": f"{task}{index}", "settings": {"a": 1},
        "reference_tokens": 128, "answer_tokens": 8, "fits": True, "bytes": 1000 * budget - index,
        "full_bytes": 1000, "accuracy": base, "agreement": base, "kl": 1 - base, "nll": 2 - base,
    }  # fmt: skip
    if task == "labels":
        made["score"] = float(index % 2)
    if method != "full":
        made |= {"value_bits": {"0": 0.5, "4": 0.25, "pinned": 0.25}, "key_bits": {"4": 0.5, "16": 0.5}}
        made |= {"heads": [[1.0, 2.0]] * 3, "positions": [[float(i) for i in range(32)]] * 3}
    return {**made, **more}


def records(count: int = 8) -> list[dict[str, Any]]:
    cells = [("full", 1.0), *itertools.product(METHODS, BUDGETS)]
    rows = [record(m, b, t, i) for (m, b), t, i in itertools.product(cells, TASKS, range(count))]
    return rows + [record(m, b, "labels", i, "after") for (m, b), i in itertools.product(cells, range(count))]


def test_estimate_is_a_mean_of_task_means() -> None:
    values = {("a", 0, 0): 1.0, ("a", 1, 0): 3.0, ("b", 0, 0): 6.0}
    found = estimate(values)
    assert found is not None
    assert (found.mean, found.n) == (4.0, 3)
    # Task a's mean is 1, 2 or 3 with the shares 1/4, 1/2, 1/4; task b's is 6.
    assert (found.low, found.high) == (3.5, 4.5)
    assert estimate({}) is None


def test_tasks_of_one_prompt_are_drawn_among_themselves() -> None:
    found = estimate({(f"t{i}", 0, 0): float(i % 2) for i in range(16)} | {("many", i, 0): 0.5 for i in range(4)})
    assert found is not None
    assert (found.mean, found.n) == (0.5, 20)
    assert found.low < 0.3 < 0.7 < found.high


def test_interval_covers_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        values = {(f"t{trial % 7}", i, 0): float(x) for i, x in enumerate(draw.normal(1, 1, 40))}
        found = estimate(values)
        assert found is not None
        hits += found.low <= 1 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_difference_is_paired() -> None:
    """What all methods find hard is no noise between them; prompts that one lacks are left out."""
    hard = {("a", i, 0): float(i) for i in range(20)}
    better = {prompt: value + 0.5 for prompt, value in hard.items() if prompt[1] != 3}
    found = difference(better, hard)
    assert found is not None
    assert (found.mean, found.low, found.high, found.n) == (0.5, 0.5, 0.5, 19)
    assert found.beyond_zero
    assert difference(better, {}) is None


def test_summary() -> None:
    table = summary(Results(records()), "seen")
    assert table.head == ["method", "budget", "bytes", "token accuracy", "agreement", "KL", "NLL", "task score", "n"]
    assert [row[:2] for row in table.rows] == [
        ["full cache", ""], ["ours", "5%"], ["worse", "5%"], ["ours", "10%"], ["worse", "10%"],
    ]  # fmt: skip
    assert table.rows[1][2] == "4.65%"  # bytes really held, not those that were allowed
    assert table.rows[1][3].startswith("0.835 [0.8")
    assert table.rows[1][-1] == "16"
    assert {(1, 3), (1, 5), (3, 3)} <= table.best
    assert not any(row in (0, 2, 4) for row, _ in table.best)
    assert best_rows([0.1, None, 0.3, 0.3], True) == [2, 3]


def test_bytes_that_are_allocated_where_they_should_be_free_are_told() -> None:
    rows = records()
    for row in rows:
        if row["method"] == "worse" and row["index"] % 2:
            row["allocated_bytes"] = 1070.0
    cells = [row[2] for row in summary(Results(rows), "seen").rows if row[1] == "5%"]
    assert cells == ["4.65%", "4.65% (56% allocated)"]  # half of the prompts hold 107%
    assert best_rows([0.1, 0.3], False) == [0]
    assert best_rows([0.1, None], False) == best_rows([0.2, 0.2], True) == []


def test_paired_table() -> None:
    table = paired(Results(records()), "seen")
    assert [row[0] for row in table.rows] == ["worse", "worse"]
    assert table.rows[0][2] == "-0.300 [-0.300, -0.300]"
    assert table.rows[0][-1] == "16"
    assert {(0, 2), (0, 4), (1, 4)} <= table.worse
    assert not table.best
    assert not paired(Results(records(2)), "after").worse  # two pairs say nothing


def test_a_method_that_does_not_fit() -> None:
    rows = records(2)
    lost = [r for r in rows if (r["method"], r["budget"]) == ("worse", 0.05)]
    for row in lost:
        row["fits"] = False
        for field in ("bytes", "accuracy", "agreement", "kl", "nll", "value_bits", "key_bits", "heads", "positions"):
            del row[field]
        row.pop("score", None)
    table = summary(Results(rows), "seen")
    assert table.rows[2] == ["worse", "5%", "does not fit", "", "", "", "", "", "4"]
    assert len(html.page(Results(rows))) > 10_000


def test_halves() -> None:
    rows = records()
    tune, report = Results(rows, "tune"), Results(rows, "report")
    assert len(tune.records) == len(report.records) == len(rows) // 2
    point = Point("seen", "ours", 0.05)
    assert not tune.rows(point).keys() & report.rows(point).keys()
    assert Results(rows).rows(point).keys() == tune.rows(point).keys() | report.rows(point).keys()
    assert "half: tune only" in markdown.page(tune)


def test_other_settings_under_one_name_and_other_lengths_are_kept_apart() -> None:
    rows = records(2)
    results = Results([*rows, *({**row, "settings": {"a": 2}} for row in rows if row["method"] == "ours")])
    assert results.methods == ["ours", "worse", "ours (2)"]
    assert len(results.rows(Point("seen", "ours", 0.05))) == len(results.rows(Point("seen", "ours (2)", 0.05))) == 4
    longer = Results([*rows, *({**row, "sample": f"{row['sample']} and more"} for row in rows)])
    assert longer.methods == ["ours", "worse"]
    assert len(longer.rows(Point("seen", "ours", 0.05))) == 8


def test_markdown() -> None:
    page = markdown.page(Results(records()))
    for text in (
        "seeds: 0", "2000 draws", "### labels, question asked after compression", "± ", "| n |",
        "difference from ours, question seen by the compression", "-0.300 [-0.300, -0.300] †",
    ):  # fmt: skip
        assert (text in page) == (text != "± ")
    for table in (*overview(Results(records())), *by_task(Results(records()))):
        assert all(len(row) == len(table.head) for row in table.rows)


class Reader(HTMLParser):
    """Checks that tags close in order, ids are single and nothing points outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_one_sound_file() -> None:
    page = html.page(Results(records()))
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    assert len(reader.ids) == len(set(reader.ids))
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in reader.links)
    assert {link[1:] for link in reader.links if link.startswith("#")} <= set(reader.ids)
    assert "<script" not in page
    assert "tiny &lt;model&gt;" in page
    # Two curves, four histograms, and maps of two methods at two budgets in two protocols.
    assert page.count("<svg") == 2 + 4 + 8
    assert set(re.findall(r"https?://[^\"' )<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_charts_have_what_was_measured() -> None:
    results = Results(records())
    curve, bars = charts.pareto(results, "seen"), charts.histogram(results, "seen", "value_bits")
    for text in ("token accuracy", "task score", "KL", "full cache", "ours", "worse", "5%", "10%"):
        assert text in curve
    assert bars is not None
    assert "pinned, 16" in bars
    assert charts.histogram(Results([r for r in records() if r["method"] == "full"]), "seen", "key_bits") is None
    assert heat_maps(results, "seen", "full", 1.0) is None
    only_full = Results([r for r in records() if r["method"] == "full"])
    assert only_full.estimate(full("seen"), "kl") is not None
    assert only_full.methods == []


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Callable[[Path], str] = lambda path: path.read_text(encoding="utf-8")  # noqa: E731
    first = [read(path) for path in write_reports(records(), tmp_path)]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["report.html", "report.md"]
    assert first == [read(path) for path in write_reports(records(), tmp_path)]  # the same cells, the same report
    with pytest.raises(ConfigError, match="no cells of half 'tune'"):
        write_reports([], tmp_path, "tune")
