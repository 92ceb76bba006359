"""Tasks by name, generated and LongBench's, and their samples in tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rdkv.runtime.errors import ConfigError
from rdkv.runtime.options import did_you_mean

from ..sample import HALVES, Half, Sample, half_of
from . import longbench, registry
from .sample import Source, TaskSample

PREFIX = "longbench/"


@dataclass(frozen=True)
class Catalogue:
    """What samples are made from.

    Attributes:
        source: text and questions of generated tasks.
        data: LongBench's folder or ``hub``, if there is one.
        length: tokens of a prompt, at most.
        samples: of each task, of both halves together.
        seed: of generated tasks.
        halves: which samples to take, see `sample.half_of`.
    """

    source: Source
    data: str | None
    length: int
    samples: int
    seed: int = 0
    halves: tuple[Half, ...] = HALVES

    @property
    def names(self) -> list[str]:
        """Every task that there is material for."""
        real = [] if self.data is None else [PREFIX + name for name in longbench.available(self.data)]
        return [*registry.available(self.source), *real]

    @property
    def groups(self) -> dict[str, list[str]]:
        """Names that stand for several tasks."""
        names = self.names
        real = [name for name in names if name.startswith(PREFIX)]
        ruler = [name for name in names if name in registry.RULER]
        return {"all": names, "ruler": ruler, "longbench": real, "generated": [n for n in names if n not in real]}

    def resolve(self, wanted: Sequence[str]) -> list[str]:
        """Names of tasks from names of tasks and groups, each once.

        Raises:
            ConfigError: no such task, or not the material for it.
        """
        groups, names = self.groups, self.names
        chosen: list[str] = []
        for name in wanted:
            if groups.get(name):
                chosen += groups[name]
            elif name in names:
                chosen.append(name)
            else:
                raise ConfigError(self._unknown(name, [*names, *groups]))
        return list(dict.fromkeys(chosen))

    def make(self, tokenizer: PreTrainedTokenizerBase, task: str) -> Iterator[Sample]:
        """The samples of a task; as many as there are, if LongBench has fewer."""
        indices = [i for i in range(self.samples) if half_of(task, i, self._seed(task)) in self.halves]
        if task.startswith(PREFIX):
            assert self.data is not None
            name = task.removeprefix(PREFIX)
            rows = longbench.read_rows(name, self.data)
            for index in indices[: sum(index < len(rows) for index in indices)]:
                yield longbench.make_sample(name, rows[index], tokenizer, self.length, index)
        else:
            for index in indices:
                made = registry.make_sample(task, tokenizer, self.source, self.length, index, self.seed)
                yield in_tokens(made, tokenizer, self.seed)

    def _seed(self, task: str) -> int:
        return 0 if task.startswith(PREFIX) else self.seed

    def _unknown(self, name: str, known: list[str]) -> str:
        if name in registry.TASKS:
            return f"task {name} asks for material that is not there: give --questions for RULER's two QA tasks"
        if self.data is None and (name == "longbench" or name.removeprefix(PREFIX) in longbench.specs()):
            return f"task {name} is of LongBench: give --data with its folder, or --data hub"
        return f"unknown task {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}"


def in_tokens(made: TaskSample, tokenizer: PreTrainedTokenizerBase, seed: int) -> Sample:
    """A generated sample for one model."""
    context, question = made.encode(tokenizer)
    return Sample(
        task=made.task,
        index=made.index,
        seed=seed,
        context=tuple(context),
        question=tuple(question),
        answer=tuple(tokenizer(" " + made.answer, add_special_tokens=False).input_ids),
        answer_tokens=made.answer_tokens,
        judge=None if made.metric is None else made.score,
        finished=made.finished,
    )
