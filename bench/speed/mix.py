"""The bits that real prompts get: shares of value widths of tokens and of key widths of channels, by budget.

    python -m bench.speed.mix --model smollm2-135m --data DIR --out bench/results/bit-mix-smollm2.json

Prompts of LongBench go through `rdkv.CompressedCache` with its defaults; the speed of decoding is measured on
packed prompts of these shares (`bench.speed.attention`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rdkv
from rdkv.runtime.loading import load_model

from ..machine import describe
from ..quality.sample import Sample
from ..quality.tasks.longbench import make_sample, read_rows

TASKS = ("gov_report", "hotpotqa", "narrativeqa", "qmsum", "repobench-p")
BLOCK = 16  # key columns come in multiples of this
GROUP = 4  # channels that share a width


@dataclass
class Tally:
    """What the heads of all layers and prompts got at one budget."""

    tokens: int = 0
    values: Counter[str] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)
    profiles: Counter[str] = field(default_factory=Counter)  # widths of a head's channel groups, falling
    columns: list[int] = field(default_factory=list)  # of each head that holds codes
    kept: list[list[int]] = field(default_factory=list)  # of each head, by layer
    held: list[float] = field(default_factory=list)  # bytes over those of the full cache, of each prompt

    def add(self, plan: rdkv.BitPlan) -> None:
        """Count one layer of one prompt, ``[1, H, T]`` and ``[1, H, D]``."""
        self.kept.append([])
        for bits, key_bits, pinned in zip(plan.value_bits[0], plan.key_bits[0], plan.pinned[0], strict=True):
            coded = bits[(bits > 0) & ~pinned]
            self.tokens += len(bits)
            self.values.update(Counter(map(str, coded.tolist())) | Counter(pinned=int(pinned.sum())))
            self.kept[-1].append(len(coded) + int(pinned.sum()))
            raw = bool((coded == 16).all() & (key_bits == 16).all())  # nothing is quantised: no codes
            if not raw:
                self.keys.update(map(str, key_bits.tolist()))
                self.profiles[",".join(map(str, key_bits.sort(descending=True).values[::GROUP].tolist()))] += 1
                self.columns.append(-(-int(key_bits.sum()) // (2 * BLOCK)) * BLOCK)

    def summary(self) -> dict[str, Any]:
        """Shares and means, as the file holds them."""
        kept = sum(self.values.values())
        heads = sum(map(len, self.kept))
        ratios = [head / statistics.mean(layer) for layer in self.kept if any(layer) for head in layer]
        return {
            "bytes_of_full": round(statistics.mean(self.held), 5),
            "kept": round(kept / self.tokens, 5),
            "value_widths": _shares(self.values),
            "key_widths": _shares(self.keys),
            "key_profiles": {p: round(n / len(self.columns), 6) for p, n in self.profiles.most_common()},
            "key_columns": round(statistics.mean(self.columns), 2) if self.columns else 0,
            "key_columns_deciles": _deciles(self.columns),
            "heads_without_codes": round(1 - len(self.columns) / heads, 5),
            "kept_over_layer_mean_deciles": [round(r, 3) for r in _deciles(ratios)],
        }


def _deciles(values: list[Any]) -> list[Any]:
    """The least, each tenth and the most."""
    ordered = sorted(values)
    return [ordered[i * (len(ordered) - 1) // 10] for i in range(11)] if ordered else []


def _shares(counts: Counter[str]) -> dict[str, float]:
    total = sum(counts.values())
    order = sorted(counts, key=lambda width: int(width) if width.isdigit() else 99, reverse=True)  # "pinned" first
    return {width: round(counts[width] / total, 6) for width in order if counts[width]}


@torch.no_grad()
def tally(model: PreTrainedModel, samples: list[Sample], budget: float) -> Tally:
    """Compress every prompt at ``budget`` and count."""
    result = Tally()
    for sample in samples:
        cache = rdkv.CompressedCache(model.config, rdkv.CompressionConfig(budget=budget, calibration="none"))
        model(torch.tensor([sample.compressed("seen")], device=model.device), past_key_values=cache, logits_to_keep=1)
        for layer in range(model.config.num_hidden_layers):
            result.add(cache.plan(layer))
        result.held.append(cache.retention)
    return result


def prompts(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, task: str) -> list[Sample]:
    """The first samples of a task that are long enough, cut to the length."""
    rows = enumerate(read_rows(task, str(arguments.data)))
    drawn = (make_sample(task, row, tokenizer, arguments.length, index) for index, row in rows)
    long = (sample for sample in drawn if len(sample.compressed("seen")) == arguments.length)
    return list(itertools.islice(long, arguments.samples))


def command(arguments: argparse.Namespace) -> str:
    """The command line that makes the file again; folders of the machine are named DIR."""
    words = ["python -m bench.speed.mix", f"--model {Path(arguments.model).name}", "--data DIR"]
    words += [f"--budgets {' '.join(map(str, arguments.budgets))}", f"--length {arguments.length}"]
    words += [f"--tasks {' '.join(arguments.tasks)}", f"--samples {arguments.samples}", f"--out {arguments.out.name}"]
    return " ".join(words)


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", default="smollm2-135m")
    result.add_argument("--data", type=Path, required=True, help="folder of LongBench JSON files")
    result.add_argument("--tasks", nargs="+", default=list(TASKS))
    result.add_argument("--samples", type=int, default=1, help="prompts of each task")
    result.add_argument("--length", type=int, default=6000, help="tokens of a prompt; shorter ones are left out")
    result.add_argument("--budgets", nargs="+", type=float, default=[0.01, 0.0248, 0.05, 0.1])
    result.add_argument("--device", default="auto")
    result.add_argument("--out", type=Path, required=True)
    return result


def main() -> None:
    """The command line."""
    arguments = parser().parse_args()
    loaded = load_model(arguments.model, device=arguments.device)
    rdkv.attach(loaded.model)
    samples = [s for task in arguments.tasks for s in prompts(arguments, loaded.tokenizer, task)]
    config = loaded.model.config
    record: dict[str, Any] = {
        "command": command(arguments),
        "model": Path(arguments.model).name,
        "layers": config.num_hidden_layers,
        "kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "prompts": len(samples),
        "tasks": [sample.task.removeprefix("longbench/") for sample in samples],
        "tokens": arguments.length,
        "dtype": loaded.dtype,
        **describe(),
        "budgets": {},
    }
    for budget in arguments.budgets:
        begin = time.time()
        record["budgets"][str(budget)] = summary = tally(loaded.model, samples, budget).summary()
        print(f"{budget:g}: {json.dumps(summary)} ({time.time() - begin:.0f} s)", flush=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
