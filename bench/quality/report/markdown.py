"""The report in Markdown."""

from __future__ import annotations

from .results import Results
from .tables import Table, by_task, conditions, overview


def page(results: Results) -> str:
    """The whole report."""
    parts = ["# Ablation", "", *(f"* {name}: {value}" for name, value in conditions(results)), ""]
    parts += ["Figures are means over tasks of the mean over a task's prompts, with 95% intervals.", ""]
    for title, tables in (("All tasks", overview(results)), ("Task by task", by_task(results))):
        parts += [f"## {title}", ""]
        for table in tables:
            parts += [f"### {table.title}", "", markdown(table), ""]
    return "\n".join(parts)


def markdown(table: Table) -> str:
    """One table."""
    lines = ["| " + " | ".join(table.head) + " |", "|" + "---|" * len(table.head)]
    for number, row in enumerate(table.rows):
        cells = [_marked(cell, (number, i) in table.best, (number, i) in table.worse) for i, cell in enumerate(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(["", table.note] if table.note else [])])


def _marked(cell: str, best: bool, worse: bool) -> str:
    return f"**{cell}{' †' if worse else ''}**" if cell and (best or worse) else cell
