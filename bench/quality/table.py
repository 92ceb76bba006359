"""A Markdown table from the records of `teacher_forced`: means with 95% bootstrap intervals, paired on prompts.

python -m bench.quality.table results.jsonl --split all|even|odd --tasks-are longbench|synthetic|all
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .tasks import TASKS

SYNTHETIC = {"passkey", "needle", "needles", "recitation", "text", *TASKS}
Record = dict[str, Any]


def select(records: list[Record], split: str, kind: str) -> list[Record]:
    """Records of every prompt, or of those of even or odd index; of one kind of task, or all."""
    chosen = [r for r in records if split == "all" or r["index"] % 2 == (split == "odd")]
    return [r for r in chosen if kind == "all" or (r["task"] in SYNTHETIC) == (kind == "synthetic")]


def interval(values: list[float], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the mean."""
    draw = random.Random(seed)
    means = sorted(sum(draw.choices(values, k=len(values))) / len(values) for _ in range(draws))
    return means[int(draws * 0.025)], means[int(draws * 0.975)]


def task_mean(rows: list[Record], field: str) -> float:
    """Mean over tasks of the mean over a task's prompts."""
    tasks: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        tasks[row["task"]].append(row[field])
    return sum(sum(v) / len(v) for v in tasks.values()) / len(tasks)


def markdown(records: list[Record]) -> str:
    """The table, methods in order of their mean KL."""
    cells: defaultdict[tuple[str, float], list[Record]] = defaultdict(list)
    for record in records:
        cells[record["method"], record["budget"]].append(record)
    budgets = sorted({budget for _, budget in cells if budget < 1})
    lines = ["| method | " + " | ".join(f"{100 * b:g}%: accuracy; KL [95%]; bytes" for b in budgets) + " | n |"]
    lines.append("|" + "---|" * (len(budgets) + 2))
    methods = {method for method, budget in cells if budget < 1}

    def cell(method: str, budget: float) -> str:
        rows = cells.get((method, budget))
        if not rows:
            return "does not fit"
        low, high = interval([r["kl"] for r in rows])
        held = sum(r["retention"] for r in rows) / len(rows)
        kl = task_mean(rows, "kl")
        return f"{task_mean(rows, 'accuracy'):.3f}; {kl:.3f} [{low:.3f}, {high:.3f}]; {100 * held:.2f}%"

    order: Callable[[str], float] = lambda m: sum(  # noqa: E731
        task_mean(cells[m, b], "kl") if (m, b) in cells else 9.0 for b in budgets
    )
    for method in sorted(methods, key=order):
        n = max(len(cells[method, b]) for b in budgets if (method, b) in cells)
        lines.append(f"| {method} | " + " | ".join(cell(method, b) for b in budgets) + f" | {n} |")
    full = [r for r in records if r["method"] == "full"]
    lines.append(f"\nFull cache: token accuracy {task_mean(full, 'accuracy'):.3f}, n = {len(full)}.")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--split", choices=["all", "even", "odd"], default="all")
    parser.add_argument("--tasks-are", choices=["all", "longbench", "synthetic"], default="all")
    arguments = parser.parse_args()
    records = [json.loads(line) for path in arguments.results for line in path.read_text().splitlines()]
    chosen = select(records, arguments.split, arguments.tasks_are)
    print(markdown(chosen) if chosen else "no records")


if __name__ == "__main__":
    main()
