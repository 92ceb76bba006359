"""A sweep: every method at every budget on every sample, cell by cell, resumed where it was interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import rdkv
from rdkv.runtime.loading import LoadedModel

from ..machine import describe
from .cells import Cells, cell_key
from .evaluate import FULL, Batch, Cell, Kinds
from .method import Method
from .sample import Protocol, Sample, batches


@dataclass(frozen=True)
class Work:
    """What is to be measured.

    Attributes:
        loaded: the model; attached while it runs.
        samples: prompts, of all tasks.
        methods, budgets: the grid; the full cache is measured besides.
        protocols: which of `sample.PROTOCOLS`.
        kinds: which scores.
        batch: prompts of one length that may run at once.
    """

    loaded: LoadedModel
    samples: Sequence[Sample]
    methods: Sequence[Method]
    budgets: Sequence[float]
    protocols: Sequence[Protocol]
    kinds: Kinds
    batch: int = 1

    @property
    def grid(self) -> list[Cell]:
        """The full cache, and every method at every budget."""
        return [FULL, *(Cell(method, budget) for method in self.methods for budget in self.budgets)]

    def identity(self, cell: Cell, sample: Sample, protocol: Protocol) -> dict[str, Any]:
        """All that decides a cell's figures, but the machine and the versions."""
        kinds = self.kinds
        return {
            "model": self.loaded.name,
            "dtype": self.loaded.dtype,
            "method": cell.method.name,
            "settings": cell.method.settings,
            "budget": cell.budget,
            "protocol": protocol,
            "task": sample.task,
            "index": sample.index,
            "seed": sample.seed,
            "sample": sample.digest,
            "reference_tokens": kinds.reference_tokens if kinds.forced else 0,
            "answer_tokens": (kinds.answer_tokens or sample.answer_tokens) if kinds.generated and sample.judge else 0,
        }


class Ticks:
    """Hears how a sweep goes; this one keeps quiet."""

    def start(self, total: int, done: int) -> None:
        """So many cells in all, and so many that are there already."""

    def step(self, cells: int, what: str) -> None:
        """So many more cells, and what they were."""


def run(work: Work, cells: Cells, ticks: Ticks, seconds: float = float("inf")) -> int:
    """Measure what ``cells`` does not hold yet; a cell is on the disk before the next one begins.

    Args:
        seconds: begin no prompt after this long.

    Returns:
        How many cells were added.
    """
    machine, begin, added = describe(), time.monotonic(), 0
    plan = [(protocol, s) for protocol in work.protocols for s in work.samples if protocol in s.protocols]
    keys = {cell_key(work.identity(cell, s, protocol)) for protocol, s in plan for cell in work.grid}
    ticks.start(len(keys), len(keys & cells.done))
    rdkv.attach(work.loaded.model)
    try:
        for protocol, group in _groups(work):
            if time.monotonic() - begin > seconds:
                break
            missing = list(_missing(work, group, protocol, cells))
            if not missing:
                continue
            batch = Batch(work.loaded.model, work.loaded.tokenizer, group, protocol, work.kinds)
            for cell, wanted in missing:
                records = [
                    {"key": key, **identity, **_about(sample, protocol), **record, **machine}
                    for sample, record in zip(group, batch.records(cell), strict=True)
                    if (key := cell_key(identity := work.identity(cell, sample, protocol))) in wanted
                ]
                cells.add(records)
                added += len(records)
                ticks.step(len(records), f"{group[0].task}, {protocol}: {cell.method.name} at {100 * cell.budget:g}%")
    finally:
        rdkv.detach(work.loaded.model)
    return added


def _groups(work: Work) -> Iterator[tuple[Protocol, list[Sample]]]:
    """Batches in order of their first sample, protocol by protocol within a sample's turn."""
    made = [
        (protocol, group)
        for protocol in work.protocols
        for group in batches(
            [s for s in work.samples if protocol in s.protocols], protocol, work.batch, work.kinds.generated
        )
    ]
    order: Callable[[tuple[Protocol, list[Sample]]], Any] = lambda pair: pair[1][0].index  # noqa: E731
    yield from sorted(made, key=order)  # a sweep that is cut short covers every task and protocol


def _missing(work: Work, group: Sequence[Sample], protocol: Protocol, cells: Cells) -> Iterator[tuple[Cell, set[str]]]:
    """Cells that some sample of a batch lacks, with the keys of those."""
    for cell in work.grid:
        wanted = {cell_key(work.identity(cell, sample, protocol)) for sample in group} - cells.done
        if wanted:
            yield cell, wanted


def _about(sample: Sample, protocol: Protocol) -> dict[str, Any]:
    return {
        "half": sample.half,
        "compressed_tokens": len(sample.compressed(protocol)),
        "asked_tokens": len(sample.asked(protocol)),
        "reference_length": len(sample.answer),
    }
