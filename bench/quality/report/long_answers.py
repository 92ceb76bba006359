"""The table of long answers, from the records of `bench.quality.long_answers`.

python -m bench.quality.report.long_answers bench/results/long-answers-*.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .stats import Estimate, estimate

Record = dict[str, Any]
SPAN = 64  # positions of a record's entry
LAST = 512  # tokens at the end of an answer, which have figures of their own
HEAD = (
    "budget",
    "block",
    "KL",
    f"KL, last {LAST}",
    "same likeliest token",
    f"the same, last {LAST}",
    "held",
    "ms a step",
)


def table(records: Sequence[Record]) -> str:
    """Markdown: means over all positions and over the last ones, with 95% bootstrap intervals over documents."""
    lines = []
    for record in records:
        case = f"{record['device']}, {record['dtype']}: {record['model']}, {len(record['kl'][0])} documents, "
        case += f"prompts of {record['prompt']:,} tokens, answers of {record['answer']:,}."
        if case not in lines:
            lines += ["", case, "", f"| {' | '.join(HEAD)} |", f"|{' ---: |' * len(HEAD)}"]
        lines.append(f"| {' | '.join(row(record))} |")
    return "\n".join(lines[1:])


def row(record: Record) -> list[str]:
    """Cells of one size of block."""
    last = -(-LAST // SPAN)
    scores = [over_documents(record[name][-count:]) for name in ("kl", "same") for count in (0, last)]
    held = (record["tail_bytes"] + record["packed_bytes"]) / record["full_bytes"]
    figures = [f"{e.mean:.3f} ({e.low:.3f} to {e.high:.3f})" for e in scores]
    step = "not measured" if record["step_ms"] is None else f"{record['step_ms']:.2f}"
    return [f"{record['budget']:.3g}", str(record["block"] or "none"), *figures, f"{held:.1%}", step]


def over_documents(scores: Sequence[Sequence[float]]) -> Estimate:
    """The mean of ``[N][B]``, with its interval over the documents."""
    found = estimate({("document", str(i)): value for i, value in enumerate(np.mean(scores, axis=0).tolist())})
    assert found is not None
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    print(table([json.loads(line) for path in parser.parse_args().results for line in path.read_text().splitlines()]))


if __name__ == "__main__":
    main()
