"""Prompts with reference answers: LongBench from local JSON, synthetic ones from any text, and those of `tasks`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .tasks import Source, answers, available, make_sample

GRAIN = 500  # tokens


@dataclass(frozen=True)
class Sample:
    """One prompt: token ids of the prompt and of its reference answer."""

    task: str
    index: int
    prompt: list[int]
    answer: list[int]


def longbench(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tasks: list[str], samples: int, length: int, answer: int
) -> Iterator[Sample]:
    """Samples of ``<task>.json`` files with ``origin_prompt`` and ``gold``.

    Prompts lose their middle down to ``length`` tokens, or to a multiple of `GRAIN`, so that prompts of
    one length can share a batch.
    """
    for task in tasks:
        rows = json.loads((folder / f"{task}.json").read_text())
        rows = list(rows.values()) if isinstance(rows, dict) else rows
        for index, row in enumerate(rows[:samples]):
            prompt = tokenizer(row["origin_prompt"]).input_ids
            keep = min(length, max(GRAIN, len(prompt) // GRAIN * GRAIN))
            if len(prompt) > keep:
                prompt = prompt[: keep // 2] + prompt[-(keep - keep // 2) :]
            reference = tokenizer(" " + answers(row["gold"])[0].strip(), add_special_tokens=False).input_ids
            yield Sample(task, index, prompt, reference[:answer])


def synthetic(
    text: str, tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int = 0
) -> Iterator[Sample]:
    """Passkey, needle, four needles, recitation of an earlier passage, and plain continuation of ``text``."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    for task in ("passkey", "needle", "needles", "recitation", "text"):
        for index in range(samples):
            draw = random.Random(f"{seed}-{task}-{index}")
            start = draw.randrange(len(ids) - 2 * length)
            yield Sample(task, index, *_synthetic(task, draw, ids[start : start + 2 * length], tokenizer, length))


def _synthetic(
    task: str, draw: random.Random, ids: list[int], tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[list[int], list[int]]:
    def encode(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False).input_ids)

    if task == "text":
        return ids[:length], ids[length : length + 64]
    if task == "recitation":
        at = draw.randrange(length // 8, length * 3 // 4)
        cue, rest = ids[at : at + 32], ids[at + 32 : at + 96]
        cue = encode("\n\nThe passage again: ") + cue
        return ids[: length - len(cue)] + cue, rest
    cities = draw.sample(["Lagos", "Quito", "Hanoi", "Oslo", "Perth", "Turin", "Dakar", "Lima"], 4)
    numbers = [str(draw.randrange(1_000_000, 9_999_999)) for _ in cities]
    if task == "passkey":
        needles = [f"\n\nThe pass key is {numbers[0]}. Remember it. {numbers[0]} is the pass key.\n\n"]
        question, answer = "\n\nWhat is the pass key? The pass key is", f" {numbers[0]}"
    else:
        count = 1 if task == "needle" else 4
        pairs = list(zip(cities, numbers, strict=True))[:count]
        needles = [f"\n\nThe special magic number for {city} is {number}.\n\n" for city, number in pairs]
        city, number = draw.choice(pairs)
        question = f"\n\nWhat is the special magic number for {city}? The special magic number for {city} is"
        answer = f" {number}"
    parts, asked = [encode(needle) for needle in needles], encode(question)
    hay = ids[: length - len(asked) - sum(map(len, parts))]
    for part in parts:
        at = draw.randrange(len(hay) // 20, len(hay) * 19 // 20)
        hay = hay[:at] + part + hay[at:]
    return hay + asked, encode(answer)


def generated(
    source: Source, tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int = 0
) -> Iterator[Sample]:
    """Samples of every task in `tasks` that the source has the material for, each with its question in the prompt."""
    for task in available(source):
        for index in range(samples):
            sample = make_sample(task, tokenizer, source, length, index, seed)
            context, asked = sample.encode(tokenizer)
            answer = tokenizer(" " + sample.answer, add_special_tokens=False).input_ids
            yield Sample(task, index, context + asked, list(answer))
