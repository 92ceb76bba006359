"""Settings of an ablation, the same from flags and from a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from rdkv.runtime.calibration import python_reference
from rdkv.runtime.errors import ConfigError
from rdkv.runtime.loading import load_model

from .evaluate import Kinds
from .method import Method
from .methods import check, grid, named, peers, read_methods
from .sample import HALVES, PROTOCOLS, Protocol
from .sweep import Work
from .tasks import Catalogue, Source, read_questions, read_texts


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to measure, on what and with what.

    Attributes:
        model, device, dtype: see `rdkv.runtime.loading.load_model`.
        scorers, allocators, formats: a grid; each ``NAME`` or ``NAME:option=value,option=value``.
        methods: named configurations, tables of fields of `rdkv.CompressionConfig` and perhaps ``preset``.
        methods_file, only: more of them, from a TOML file; those called ``only``, or all.
        presets: names of presets, each a method.
        peers: names of other implementations.
        budgets: fractions of the full cache's bytes.
        tasks: names of tasks and of groups (``ruler``, ``longbench``, ``generated``, ``all``).
        protocols: ``seen``: the question is in the prompt that is compressed; ``after``: it comes after compression.
        scores: ``forced`` and ``generated``.
        samples: of each task, of both halves together.
        half: ``tune``, ``report`` or ``both``.
        length: tokens of a prompt, at most.
        seed: of generated tasks.
        reference_tokens: of the reference answer that are teacher-forced, at most.
        answer_tokens: of a generated answer, at most; as many as its task allows if missing.
        data: folder of LongBench's files, or ``hub``.
        text: haystack text, file or folder; Python's language reference if missing.
        questions: JSON files for RULER's two QA tasks.
        batch: prompts of one length to run at once.
        workers: processes among which tasks are dealt out, each with a model of its own; one GPU is busy with about 15.
        seconds: begin no prompt after this long.
        out: folder of results and reports.
    """

    model: str = "smollm2-135m"
    device: str = "auto"
    dtype: str = "auto"
    scorers: tuple[str, ...] = ()
    allocators: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    methods: dict[str, dict[str, Any]] = {}
    methods_file: str | None = None
    only: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    budgets: tuple[float, ...] = (0.0248, 0.05, 0.1)
    tasks: tuple[str, ...] = ("niah_single_2", "niah_multikey_1", "labels", "recitation", "text")
    protocols: tuple[Protocol, ...] = PROTOCOLS
    scores: tuple[Literal["forced", "generated"], ...] = ("forced", "generated")
    samples: int = 4
    half: Literal["tune", "report", "both"] = "both"
    length: int = 4000
    seed: int = 0
    reference_tokens: int = 128
    answer_tokens: int | None = None
    data: str | None = None
    text: str | None = None
    questions: tuple[str, ...] = ()
    batch: int = 1
    workers: Annotated[int, msgspec.Meta(ge=1)] = 1
    seconds: float | None = None
    out: str = "out/ablation"

    @property
    def all_methods(self) -> list[Method]:
        """Every method that is named, one after the other."""
        file = [] if self.methods_file is None else read_methods(Path(self.methods_file), self.only)
        presets = named({name: {"preset": name} for name in self.presets})
        return [*grid(self.scorers, self.allocators, self.formats), *named(self.methods), *file, *presets,
                *peers(self.peers)]  # fmt: skip

    @property
    def catalogue(self) -> Catalogue:
        """What samples are made from."""
        text = python_reference() if self.text is None else read_texts(Path(self.text))
        questions = tuple(question for file in self.questions for question in read_questions(Path(file)))
        halves = HALVES if self.half == "both" else (self.half,)
        return Catalogue(Source(text, questions), self.data, self.length, self.samples, self.seed, halves)

    @property
    def kinds(self) -> Kinds:
        """Which scores."""
        return Kinds("forced" in self.scores, "generated" in self.scores, self.reference_tokens, self.answer_tokens)

    def work(self) -> Work:
        """Load the model, check every method, and make the samples.

        Raises:
            ConfigError: a mistake in the settings, before anything is measured.
        """
        catalogue, methods = self.catalogue, self.all_methods
        tasks = catalogue.resolve(self.tasks)
        loaded = load_model(self.model, self.device, self.dtype)
        check(methods, loaded.model.config, self.budgets)
        samples = [sample for task in tasks for sample in catalogue.make(loaded.tokenizer, task)]
        if not samples:
            raise ConfigError(f"no samples: half {self.half!r} of {self.samples} a task is empty; ask for more samples")
        return Work(loaded, samples, methods, self.budgets, self.protocols, self.kinds, self.batch)


def settings_from(values: dict[str, Any]) -> Settings:
    """Settings from plain values.

    Raises:
        ConfigError: an unknown setting, or a value that it does not take.
    """
    try:
        return msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"settings: {error}") from error
