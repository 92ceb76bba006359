"""Token accuracy and KL to the full cache on reference answers, for many methods on the same prompts.

    python -m bench.quality.teacher_forced --model smollm2-135m --data DIR --methods methods.toml \\
        --budgets 0.0248 0.05 0.1 --out results.jsonl

A method is a table of a TOML file: any fields of `rdkv.CompressionConfig` but the budget. The prompt is
prefilled and compressed as a user's would be; then one pass over the reference answer gives the logits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

import rdkv
from rdkv.runtime.calibration import python_reference
from rdkv.runtime.errors import BudgetError
from rdkv.runtime.loading import load_model

from ..machine import describe
from .prompts import Sample, generated, longbench, synthetic
from .tasks import Source, read_questions, read_texts


@torch.no_grad()
def answer_logits(model: PreTrainedModel, samples: list[Sample], cache: Cache) -> list[Tensor]:
    """Logits for every answer token of each sample, ``[n, V]``, after prefilling ``cache`` with the prompts."""
    prompts = torch.tensor([sample.prompt for sample in samples], device=model.device)
    logits = model(prompts, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    longest = max(len(sample.answer) for sample in samples) - 1
    if longest > 0:
        # Padded on the right: later tokens change nothing for earlier ones.
        answers = [sample.answer[:-1] + [0] * (longest - len(sample.answer) + 1) for sample in samples]
        rest = model(torch.tensor(answers, device=model.device), past_key_values=cache, use_cache=True).logits
        logits = torch.cat([logits, rest], 1)
    return [row[: len(sample.answer)] for row, sample in zip(logits, samples, strict=True)]


def compare(logits: Tensor, full: Tensor, answer: list[int]) -> dict[str, float]:
    """Token accuracy, and KL from the full cache's distribution in nats, each a mean over the answer."""
    truth = torch.tensor(answer, device=logits.device)
    p, q = full.float().log_softmax(-1), logits.float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return {"accuracy": (logits.argmax(-1) == truth).float().mean().item(), "kl": kl.item()}


def batches(samples: list[Sample], size: int) -> list[list[Sample]]:
    """Samples of one prompt length together, at most ``size``, in order of their first sample."""
    by_length: dict[int, list[Sample]] = {}
    done: list[list[Sample]] = []
    for sample in samples:
        group = by_length.setdefault(len(sample.prompt), [])
        if not group:
            done.append(group)
        group.append(sample)
        if len(group) == size:
            del by_length[len(sample.prompt)]
    return done


def run(
    model: PreTrainedModel, batch: list[Sample], methods: dict[str, dict[str, Any]], budgets: list[float]
) -> Iterator[dict[str, Any]]:
    """One record for each sample, method and budget."""
    keys = [{"task": s.task, "index": s.index, "tokens": len(s.prompt)} for s in batch]
    full = answer_logits(model, batch, DynamicCache(config=model.config))
    for key, row, sample in zip(keys, full, batch, strict=True):
        yield {**key, "method": "full", "budget": 1.0, "retention": 1.0, **compare(row, row, sample.answer)}
    for (name, fields), budget in itertools.product(methods.items(), budgets):
        cache = rdkv.CompressedCache(model.config, rdkv.CompressionConfig(**fields, budget=budget))
        try:
            logits = answer_logits(model, batch, cache)
        except BudgetError:
            continue  # a quantisation-only method below its least width
        for key, row, reference, sample in zip(keys, logits, full, batch, strict=True):
            result = compare(row, reference, sample.answer)
            yield {**key, "method": name, "budget": budget, "retention": cache.retention, **result}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, help="folder of LongBench JSON files; synthetic prompts alone if missing")
    parser.add_argument(
        "--text", type=Path, help="haystack text, file or folder; Python's language reference if missing"
    )
    parser.add_argument("--methods", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="methods of the file to run; all if missing")
    parser.add_argument("--tasks", nargs="*", help="LongBench tasks to run; all of the folder if missing")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.0248, 0.05, 0.1])
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--length", type=int, default=6500)
    parser.add_argument("--synthetic", type=int, default=0, help="samples of each synthetic task")
    parser.add_argument("--generated", type=int, default=0, help="samples of each task of RULER and of retrieval")
    parser.add_argument("--questions", type=Path, nargs="*", default=[], help="JSON files for RULER's two QA tasks")
    parser.add_argument("--batch", type=int, default=1, help="prompts of one length to run at once")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no new batch after this long")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()

    loaded = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    rdkv.attach(loaded.model)
    methods = tomllib.loads(arguments.methods.read_text())
    if arguments.only:
        methods = {name: methods[name] for name in arguments.only}
    samples: list[Sample] = []
    if arguments.data:
        tasks = sorted(path.stem for path in arguments.data.glob("*.json"))
        samples += longbench(
            arguments.data, loaded.tokenizer, arguments.tasks or tasks, arguments.samples, arguments.length, answer=128
        )
    text = read_texts(arguments.text) if arguments.text else python_reference()
    if arguments.synthetic:
        samples += synthetic(text, loaded.tokenizer, arguments.synthetic, arguments.length - 500)
    if arguments.generated:
        source = Source(text, tuple(question for path in arguments.questions for question in read_questions(path)))
        samples += generated(source, loaded.tokenizer, arguments.generated, arguments.length)
    samples.sort(key=lambda sample: (sample.index, sample.task))  # a run cut short covers every task
    begin, count, machine = time.time(), 0, describe()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as out:
        for batch in batches(samples, arguments.batch):
            if time.time() - begin > arguments.seconds:
                break
            for record in run(loaded.model, batch, methods, arguments.budgets):
                out.write(json.dumps({**record, "model": arguments.model, "dtype": arguments.dtype, **machine}) + "\n")
                count += 1
    print(f"{count} records in {time.time() - begin:.0f} s: {arguments.out}")


if __name__ == "__main__":
    main()
