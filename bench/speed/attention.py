"""Time of a decode step of one layer: attention over packed prompts, beside other libraries over the full cache.

    python -m bench.speed.attention --out results.jsonl --tokens 131072 --batch 16,64 --mix smollm2

Prompts are synthetic (`bench.speed.synthetic`): their bytes are those of the budget, their widths those of the mix:
``smollm2`` as measured on real prompts, ``2bit`` every kept token and key channel at 2 bits, ``4bit`` all tokens
at 4 bits whatever the budget, ``16bit`` eviction alone. Nothing is timed whose output is wrong.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rdkv.kernels import naive, naive_pack
from rdkv.kernels.decode import attend, plan
from rdkv.kernels.packed import COLUMNS, PINNED, TOKENS, Packed

from . import baselines, timing
from .cases import Case, cases, parser
from .sizes import Sizes
from .synthetic import copy, synthesize

MOST_ERROR = 2e-3  # of the output against plain PyTorch, relative
CHECKED_TOKENS = 4096  # of the two prompts that this is checked on, once for each layer, budget and mix
Record = dict[str, Any]


def inputs(case: Case, sizes: Sizes, device: str) -> tuple[Packed, Tensor]:
    """Packed prompts and a query of every query head, ``[B, H * G, 1, D]``."""
    shape = case.shape
    packed = synthesize(shape.batch, shape.heads, sizes, device, torch.bfloat16)
    query = torch.randn(shape.batch, shape.heads * shape.group, 1, shape.dim).to(device, torch.bfloat16)
    return packed, query


@torch.no_grad()
def checked_error(case: Case, device: str) -> float:
    """Relative error of the float32 output against plain PyTorch.

    Raises:
        ValueError: it is more than `MOST_ERROR`.
    """
    shape, (packed, query) = case.shape, inputs(case, case.sizes(), device)
    output, _ = attend(query, packed, plan(packed), shape.dim**-0.5)
    keys, values, held = (x.unflatten(0, (shape.batch, shape.heads)) for x in naive_pack.unpack(packed))
    truth, _ = naive.attention(query, keys, values, shape.dim**-0.5, held.unsqueeze(2))
    return relative_error(output, truth)


def relative_error(output: Tensor, truth: Tensor) -> float:
    """How far ``output`` is off.

    Raises:
        ValueError: by more than `MOST_ERROR`.
    """
    error = float((output - truth).norm() / truth.norm())
    if not error <= MOST_ERROR:
        raise ValueError(f"the output is off by {error:.2e}, more than {MOST_ERROR:.0e}: not timed")
    return float(f"{error:.3g}")


@torch.no_grad()
def measure(case: Case, bandwidth: float, device: str) -> Record:
    """Time of a step, over enough copies of the prompts that the L2 cache never has the next, and what it moves."""
    shape, sizes = case.shape, case.sizes()
    packed, query = inputs(case, sizes, device)
    read = sum(tensor.nbytes for tensor in packed.tensors())
    moved = read + 2 * query.nbytes + 4 * query[..., 0].numel()  # queries, outputs, log-sum-exps
    layers = [packed] + [copy(packed) for _ in range(timing.copies(read) - 1)]
    work, scale = plan(packed), shape.dim**-0.5
    us = timing.microseconds(lambda layer: attend(query, layer, work, scale, dtype=torch.bfloat16), layers)
    floor, rows = 1e6 * moved / bandwidth, packed.host_counts
    return {
        "us": round(us, 2),
        "held_bytes": sizes.nbytes,
        "held_of_full": round(sizes.nbytes / shape.full_bytes, 6),
        "moved_bytes": moved,
        "floor_us": round(floor, 2),
        "share_of_copy": round(floor / us, 4),
        "kept": round(sum(row[TOKENS] + row[PINNED] for row in rows) / len(rows), 1),
        "key_columns": round(sum(row[COLUMNS] for row in rows) / len(rows), 1),
        "copies": len(layers),
        "items": work.items.shape[0],
        "tile": dataclasses.asdict(work.tile),
    }


def results(chosen: Iterable[Case], bandwidth: float, others: bool, device: str = "cuda") -> Iterator[Record]:
    """A record for each case; what could not be timed has the reason in place of the time."""
    error, full = cache(checked_error), cache(baselines.full_cache)
    for case in chosen:
        small = dataclasses.replace(case, shape=dataclasses.replace(case.shape, batch=2, tokens=CHECKED_TOKENS))
        record: Record = {"kind": "attention", **dataclasses.asdict(case.shape)}
        record |= {"mix": case.mix, "budget": case.budget, "spread": case.spread, "us": None, "reason": None}
        try:
            record["error"] = error(small, device)
            record |= measure(case, bandwidth, device)
        except Exception as problem:  # no memory, too small a budget, a wrong output, a kernel that does not compile
            record["reason"] = baselines.short(problem)
        torch.cuda.empty_cache()
        if others:
            record |= full(case.shape, device)
            for name in baselines.LIBRARIES:
                theirs = record[f"{name}_us"]
                record[f"over_{name}"] = round(record["us"] / theirs, 4) if record["us"] and theirs else None
        yield record


def line(record: Record) -> str:
    """What is printed of a record."""
    budget = "all" if record["budget"] is None else f"{100 * record['budget']:g}%"
    start = f"{record['mix']} {budget} {record['tokens']} x {record['batch']}:"
    if record["us"] is None:
        return f"{start} {record['reason']}"
    parts = [f"{record['us']:.1f} us, {100 * record['share_of_copy']:.1f}% of copy, error {record['error']:.1e}"]
    for name in baselines.LIBRARIES:
        if f"{name}_us" in record:
            theirs = record[f"{name}_us"]
            parts.append(f"{name} {theirs:.1f} us" if theirs else f"{name}: {record[f'{name}_reason']}")
    return f"{start} {'; '.join(parts)}"


def main() -> None:
    """The command line."""
    arguments = parser(__doc__).parse_args()
    begin, machine = time.time(), timing.machine()
    bandwidth, way = timing.copy_bandwidth()
    machine |= {"copy_bytes_per_s": round(bandwidth), "copy_by": way}
    print(f"{machine['device']}: copies {bandwidth / 1e12:.3f} TB/s by {way}", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as out:
        for record in results(cases(arguments), bandwidth, not arguments.no_baselines):
            out.write(json.dumps(record | machine) + "\n")
            out.flush()
            print(line(record), flush=True)
            if time.time() - begin > arguments.seconds:
                break
    print(f"{time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
