"""Write the reports of a sweep."""

from __future__ import annotations

from pathlib import Path

from rdkv.runtime.errors import ConfigError

from . import html, markdown
from .results import Record, Results


def write_reports(records: list[Record], out: Path, half: str = "both") -> list[Path]:
    """``report.md`` and ``report.html`` in the folder ``out``, of one half's samples or of ``both``.

    Raises:
        ConfigError: there is nothing to report.
    """
    results = Results(records, half)
    if not results.methods:
        raise ConfigError(f"no cells of half {half!r} to report in {out}; run the sweep first")
    written = []
    for name, page in (("report.md", markdown.page(results)), ("report.html", html.page(results))):
        path = out / name
        path.write_text(page, encoding="utf-8")
        written.append(path)
    return written
