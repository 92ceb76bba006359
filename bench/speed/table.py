"""The tables of docs/performance.md, between their markers, from the records of the other commands.

    python -m bench.speed.table bench/results/*.json* --page docs/performance.md

Where a case was measured more than once the last record counts. A table without records says so.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

from .serving_table import decode_schedule, serving
from .tables import Record, attention, bits, compress, engine, gemv, values

MARKER = re.compile(r"(<!-- table: (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES = {
    "attention": attention,
    "compress": compress,
    "decode_schedule": decode_schedule,
    "engine": engine,
    "gemv": gemv,
    "leverage": values,
    "rotation": values,
    "serving": serving,
    "bits": bits,
}
NOTHING = "Not yet measured.\n"


def read(paths: Iterable[Path]) -> list[Record]:
    """Records of these tables in JSON lines, and the measured mix of bits: a file of one object with ``budgets``."""
    records: list[Record] = []
    for path in paths:
        text = path.read_text()
        found = [json.loads(text)] if path.suffix == ".json" else [json.loads(row) for row in text.splitlines() if row]
        records += [{"kind": "bits", **record} if "budgets" in record else record for record in found]
    return [record for record in records if "kind" in record]


def fill(page: str, records: list[Record]) -> str:
    """The page with its tables made anew, one for each machine."""

    def table(match: re.Match[str]) -> str:
        begin, kind, which, end = match.groups()
        machines: dict[str | None, list[Record]] = {}
        for record in records:
            if record["kind"] == kind and which in (None, record.get("mix")):
                machines.setdefault(record.get("device"), []).append(record)
        tables = "\n".join(map(TABLES[kind], machines.values()))
        return f"{begin}\n{tables or NOTHING}\n{end}"

    return MARKER.sub(table, page)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the records say otherwise")
    arguments = parser.parse_args()
    page = arguments.page.read_text()
    made = fill(page, read(arguments.results))
    if not arguments.check:
        arguments.page.write_text(made)
    elif made != page:
        raise SystemExit(f"{arguments.page}: its tables are not those of the records; make performance-table")


if __name__ == "__main__":
    main()
