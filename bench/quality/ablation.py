"""Ablations: methods at budgets on tasks, then a report.

    python -m bench.quality.ablation --scorers attention-distortion snapkv --allocators waterfill eviction \\
        --budgets 0.0248 0.05 0.1 --tasks niah_single_2 labels recitation text --out out/ablation

A TOML file (``--sweep FILE``) has the same settings by the same names; flags win. What OUT/cells.jsonl holds already
is not measured again, so an interrupted sweep goes on when it is started again. OUT/report.md and OUT/report.html are
made anew each time; ``--report-only`` makes them from what is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Console

from rdkv.runtime.config import read_toml
from rdkv.runtime.errors import RdkvError

from . import workers
from .cells import Cells, read_cells
from .progress import Bar
from .report import write_reports
from .settings import Settings, settings_from
from .sweep import run


def parse(arguments: Sequence[str]) -> tuple[Settings, bool]:
    """Settings, and whether to report only."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.ablation", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.add_argument("--sweep", metavar="FILE", default=None, help="TOML file with any of these settings")
    parser.add_argument("--report-only", action="store_true", default=False)
    help_of = _help()
    for name, kind in get_type_hints(Settings).items():
        if name == "methods":
            continue  # tables, which a file has
        parser.add_argument(f"--{name.replace('_', '-')}", help=help_of[name], **_flag(kind))
    given = vars(parser.parse_args(arguments))
    sweep, report_only = given.pop("sweep"), given.pop("report_only")
    return settings_from({**(read_toml(sweep) if sweep else {}), **given}), report_only


def _flag(kind: Any) -> dict[str, Any]:
    """What argparse has to know of a setting's type."""
    words: dict[str, Any] = {"nargs": "*"} if get_origin(kind) is tuple else {}
    if get_origin(kind) in (tuple, UnionType):
        kind = get_args(kind)[0]  # of many, or of one that may be missing
    return {**words, "choices": get_args(kind)} if get_origin(kind) is Literal else {**words, "type": kind}


def _help() -> dict[str, str]:
    """The description of each setting, from the docstring."""
    lines = (Settings.__doc__ or "").split("Attributes:\n")[1].splitlines()
    texts: dict[str, str] = {}
    for line in lines:
        names, colon, text = line.strip().partition(": ")
        if colon:
            texts |= {name.strip(): text.replace("%", "%%") for name in names.split(",")}
    return texts


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 and one line for a mistake of the user's."""
    console = Console(stderr=True)
    try:
        settings, report_only = parse(sys.argv[1:] if arguments is None else arguments)
        out = Path(settings.out)
        if settings.workers > 1 and not report_only:
            with Bar(console) as bar:
                workers.sweep(settings, bar)
        elif not report_only:
            work = settings.work()
            with Cells(out / "cells.jsonl") as cells, Bar(console) as bar:
                run(work, cells, bar, settings.seconds or float("inf"))
        for path in write_reports(list(read_cells(out / "cells.jsonl")), out, settings.half):
            print(path)
    except RdkvError as error:
        console.print(f"ablation: error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; start it again to go on", style="yellow")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
