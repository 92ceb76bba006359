"""Cells of one batch of prompts: every method at every budget, beside the full cache on the same prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

import rdkv

from .bits import bit_maps
from .method import Compressed, Full, Method, Prompt
from .sample import Protocol, Sample
from .scoring import answer_logits, compare, generate

Record = dict[str, Any]
MAPPED = 2  # samples of a task, the first ones, whose records have the maps of bits


@dataclass(frozen=True)
class Kinds:
    """Which scores to take.

    Attributes:
        forced: teacher-forced ones, on the first ``reference_tokens`` of the reference answer.
        generated: the task's metric of an answer of at most ``answer_tokens`` (None: as many as the task allows).
    """

    forced: bool = True
    generated: bool = True
    reference_tokens: int = 128
    answer_tokens: int | None = None


@dataclass(frozen=True)
class Cell:
    """A method at a budget."""

    method: Method
    budget: float


FULL = Cell(Full(), 1.0)


class Batch:
    """Samples whose compressed tokens are equally many, read once; scores of caches of them.

    Args:
        model: attached.
        samples: as `sample.batches` groups them.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        samples: Sequence[Sample],
        protocol: Protocol,
        kinds: Kinds,
    ) -> None:
        self.tokenizer, self.samples, self.kinds = tokenizer, samples, kinds
        self.asked = [sample.asked(protocol) for sample in samples]
        self.answers = [sample.answer[: kinds.reference_tokens] for sample in samples]
        self.prompt = Prompt.read(model, [sample.compressed(protocol) for sample in samples])
        with FULL.method.compress(self.prompt, 1.0) as held:
            self.full = self._logits(held) if kinds.forced else None

    def records(self, cell: Cell) -> list[Record]:
        """What a cell has for each sample: bytes, scores, and the bits that a plan has.

        A budget that the method cannot keep gives ``fits`` False and nothing else.
        """
        begin = time.perf_counter()
        try:
            with cell.method.compress(self.prompt, cell.budget) as held:
                seconds = (time.perf_counter() - begin) / len(self.samples)
                rows = self._scores(held)
                maps: list[Record] = [{} for _ in rows] if held.plans is None else bit_maps(held.plans())
        except rdkv.BudgetError as error:
            return [{"fits": False, "why": str(error)} for _ in self.samples]
        count = len(self.samples)
        size = {"fits": True, "bytes": held.nbytes / count, "full_bytes": held.full_nbytes / count}
        size |= {"retention": held.retention, "compress_seconds": round(seconds, 4)}
        if held.allocated_nbytes is not None:
            size["allocated_bytes"] = held.allocated_nbytes / count
        for sample, bits in zip(self.samples, maps, strict=True):
            if sample.index >= MAPPED:
                bits.pop("heads", None)
                bits.pop("positions", None)
        return [{**size, **row, **bits} for row, bits in zip(rows, maps, strict=True)]

    def _scores(self, held: Compressed) -> list[Record]:
        rows: list[Record] = [{} for _ in self.samples]
        if self.full is not None:
            for row, logits, full, answer in zip(rows, self._logits(held), self.full, self.answers, strict=True):
                row |= asdict(compare(logits, full, answer))
        if self.kinds.generated and any(sample.judge for sample in self.samples):
            for row, sample, text in zip(rows, self.samples, self._texts(held), strict=True):
                if sample.judge is not None:
                    row |= {"score": sample.judge(text), "text": text}
        return rows

    def _logits(self, held: Compressed) -> list[Tensor]:
        return answer_logits(self.prompt, held.fork(), self.asked, self.answers)

    def _texts(self, held: Compressed) -> list[str]:
        """Generated answers, each as long as its metric needs it; tasks without a metric get one token."""
        most = self.kinds.answer_tokens
        limits = [min(most or s.answer_tokens, s.answer_tokens) if s.judge else 1 for s in self.samples]
        finished = [lambda ids, sample=sample: sample.finished(self._text(ids)) for sample in self.samples]
        return [self._text(ids) for ids in generate(self.prompt, held.fork(), self.asked, limits, finished)]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
