"""The report as one HTML file: style and charts are inside, nothing is fetched and no script runs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

from . import charts
from .results import Results
from .tables import PROTOCOL_NAMES, Table, by_task, conditions, overview

SECTIONS = {
    "curves": "Quality against bytes", "tables": "All tasks", "tasks": "Task by task", "bits": "Who got the bits",
    "maps": "Where the bits went",
}  # fmt: skip
INTERVAL = re.compile(r"(\[[^\]]*\])")


def page(results: Results) -> str:
    """The whole report."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    bodies = {
        "curves": "".join(_figure(charts.pareto(results, p), PROTOCOL_NAMES[p]) for p in results.protocols),
        "tables": "".join(f"<h3>{escape(t.title)}</h3>{_table(t)}" for t in overview(results)),
        "tasks": _tasks(results),
        "bits": _bits(results),
        "maps": _maps(results),
    }
    links = "".join(f'<a href="#{key}">{SECTIONS[key]}</a>' for key, body in bodies.items() if body)
    parts = "".join(f'<h2 id="{key}">{SECTIONS[key]}</h2>{body}' for key, body in bodies.items() if body)
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in conditions(results))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>KV-cache ablation: {escape(', '.join(results.distinct('model')))}</title><style>{style}</style></head>"
        '<body><main><h1>KV-cache ablation</h1><p class="soft">What a compressed cache keeps of a model\'s quality, at '
        f"the bytes it really holds.</p><nav>{links}</nav><dl>{facts}</dl>{_reading(results)}{parts}</main></body>"
        "</html>\n"
    )


def _reading(results: Results) -> str:
    """How to read the figures."""
    return (
        "<p>Every figure is a mean over tasks of the mean over a task's prompts; all methods saw the same prompts. "
        "<b>Token accuracy</b>, <b>KL</b> (to the full cache, in nats) and <b>NLL</b> are teacher-forced on the "
        "reference answer; <b>agreement</b> is how often the likeliest token is the full cache's; the <b>task "
        "score</b> is the task's own metric of a generated answer. <b>Bytes</b> are those that are really held, "
        "metadata included. In a table the best method of each budget is bold; the reference of differences is "
        f"{escape(results.methods[0])}.</p>"
    )


def _figure(svg: str | None, caption: str, kind: str = "") -> str:
    if svg is None:
        return ""
    return f'<figure class="{kind}"><figcaption>{escape(caption)}</figcaption>{svg}</figure>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.head)
    budget = table.head.index("budget") if "budget" in table.head else None
    before, lines = None, []
    for number, row in enumerate(table.rows):
        classes = ["strong"] if number in table.strong else []
        if budget is not None and row[budget] != before and number:
            classes.append("first")
        before = None if budget is None else row[budget]
        kinds = {**dict.fromkeys(table.best, "best"), **dict.fromkeys(table.worse, "worse")}
        cells = "".join(_cell(text, kinds.get((number, column), "")) for column, text in enumerate(row))
        lines.append(f'<tr class="{" ".join(classes)}">{cells}</tr>')
    note = f'<p class="soft">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>{note}'
    )


def _cell(text: str, kind: str) -> str:
    inner = INTERVAL.sub(r'<span class="interval">\1</span>', escape(text))
    return f'<td class="{kind}">{inner}</td>' if kind else f"<td>{inner}</td>"


def _tasks(results: Results) -> str:
    return "".join(
        f"<details><summary>{escape(table.title)}</summary>{_table(table)}</details>" for table in by_task(results)
    )


def _bits(results: Results) -> str:
    return _joined(
        _figure(charts.histogram(results, protocol, field), f"{name}, {PROTOCOL_NAMES[protocol]}", "narrow")
        for protocol in results.protocols
        for field, name in (("value_bits", "Values"), ("key_bits", "Keys"))
    )


def _maps(results: Results) -> str:
    """Heat maps of every method and budget, the first method's open."""
    parts = []
    for protocol in results.protocols:
        for method in results.methods:
            figures = _joined(
                _figure(
                    charts.heat_maps(results, protocol, method, budget), f"{100 * budget:g}% of the bytes", "narrow"
                )
                for budget in results.budgets
            )
            if figures:
                opened = "" if parts else " open"
                title = escape(f"{method}, {PROTOCOL_NAMES[protocol]}")
                parts.append(f"<details{opened}><summary>{title}</summary>{figures}</details>")
    return "".join(parts)


def _joined(parts: Iterable[str]) -> str:
    return "".join(parts)
