"""LongBench v1 (Bai et al. 2024, arXiv 2308.14508), English tasks: rows from local files or the `datasets` hub."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerBase

from rdkv.runtime.errors import ConfigError

from ..sample import Sample
from .longbench_metrics import judge
from .questions import answers

HUB = "hub"  # in place of a folder
REPOSITORY, REVISION = "THUDM/LongBench", "refs/convert/parquet"  # the hub's own conversion: it runs no script


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task of ``longbench.toml``."""

    metric: str
    answer_tokens: int
    asks: str
    prompt: str
    line: bool = False


@dataclass(frozen=True)
class Row:
    """A prompt in two parts, its right answers, and the names of all classes where it has some."""

    context: str
    question: str
    references: tuple[str, ...]
    classes: tuple[str, ...] = ()


@cache
def specs() -> dict[str, Spec]:
    """Every task by its name."""
    return msgspec.toml.decode(Path(__file__).with_name("longbench.toml").read_bytes(), type=dict[str, Spec])


def available(data: str) -> list[str]:
    """Tasks that a folder has a file for, or all of them on the hub."""
    if data == HUB:
        return list(specs())
    return [name for name in specs() if _file(Path(data), name) is not None]


def read_rows(name: str, data: str) -> list[Row]:
    """The rows of a task.

    Args:
        data: a folder with ``NAME.json`` or ``NAME.jsonl``, or ``hub``. Rows are LongBench's own (``input``,
            ``context``, ``answers``, ``all_classes``) or have a ready ``origin_prompt`` with ``gold``.

    Raises:
        ConfigError: there is nothing, or it cannot be read.
    """
    try:
        raw = _hub_rows(name) if data == HUB else _local_rows(name, Path(data))
        return [_row(specs()[name], row) for row in raw]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read longbench/{name} from {data}: {error}") from error


def make_sample(
    name: str, row: Row, tokenizer: PreTrainedTokenizerBase, length: int, index: int, seed: int = 0
) -> Sample:
    """A sample whose prompt loses its middle down to ``length`` tokens, as LongBench does it.

    Raises:
        ConfigError: what is asked alone takes more than half of the length.
    """
    context = list(tokenizer(row.context, verbose=False).input_ids)
    question = list(tokenizer(row.question, add_special_tokens=False, verbose=False).input_ids)
    tail = length - length // 2 - len(question)
    if tail < 0:
        raise ConfigError(f"longbench/{name}: the question takes {len(question)} tokens; ask for a longer --length")
    if len(context) + len(question) > length:
        context = context[: length // 2] + context[len(context) - tail :]
    spec = specs()[name]
    reference = row.references[0] if spec.metric == "edit" else row.references[0].strip()
    space = "" if row.question[-1:].isspace() else " "
    return Sample(
        task=f"longbench/{name}",
        index=index,
        seed=seed,
        context=tuple(context),
        question=tuple(question),
        answer=tuple(tokenizer(space + reference, add_special_tokens=False).input_ids),
        answer_tokens=spec.answer_tokens,
        judge=partial(_judge, spec, row),
        finished=partial(_finished, spec),
    )


def _judge(spec: Spec, row: Row, answer: str) -> float:
    return judge(spec.metric, answer, row.references, row.classes, spec.line)


def _finished(spec: Spec, answer: str) -> bool:
    return spec.line and "\n" in answer.lstrip("\n")


def _row(spec: Spec, raw: Mapping[str, Any]) -> Row:
    if "origin_prompt" in raw:
        prompt, references, classes = raw["origin_prompt"], answers(raw["gold"]), _classes(raw["gold"])
    else:
        prompt = spec.prompt.replace("{input}", raw["input"]).replace("{context}", raw["context"])
        references, classes = answers(raw["answers"]), tuple(raw.get("all_classes") or ())
    at = prompt.rfind(spec.asks)
    if at < 0:
        raise ValueError(f"a prompt has no {spec.asks!r}")
    return Row(prompt[:at], prompt[at:], references, classes)


def _classes(gold: object) -> tuple[str, ...]:
    """Names of classes in a ``gold`` that is written as Python."""
    known: Any = gold
    if isinstance(gold, str) and gold.startswith("{"):
        known = ast.literal_eval(gold)
    return tuple(known["all_classes"]) if isinstance(known, dict) else ()


def _file(folder: Path, name: str) -> Path | None:
    return next((file for end in ("json", "jsonl") if (file := folder / f"{name}.{end}").is_file()), None)


def _local_rows(name: str, folder: Path) -> Sequence[Mapping[str, Any]]:
    file = _file(folder, name)
    if file is None:
        raise ConfigError(f"{folder} has no {name}.json or {name}.jsonl; --data is a folder of LongBench's files")
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    content = json.loads(text)
    return list(content.values()) if isinstance(content, dict) else content


def _hub_rows(name: str) -> Sequence[Mapping[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError("--data hub needs the package datasets: pip install datasets") from error
    return list(load_dataset(REPOSITORY, name, revision=REVISION, split="test"))
