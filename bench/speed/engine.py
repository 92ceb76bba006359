"""The engine end to end: first token, time per output token and memory, beside full caches and the weights alone.

    python -m bench.speed.engine --out results.jsonl --tokens 131072 --batch 1

The model has the shape of Llama-3.1-8B and random weights, in bfloat16. One random prompt is read and compressed; for
a larger batch its packed form is copied, so that every sequence has bytes of its own. Beside it, in the same process:
the products of a decode step alone (the floor of any step), the engine's own step with a full 16-bit cache, and a loop
of transformers' forward with a `DynamicCache`. What fails is recorded with its reason, and the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import rdkv
from rdkv.runtime.engine.batch import Batch
from rdkv.runtime.engine.engine import CompressedPrompt, Engine
from rdkv.runtime.engine.fused import FusedForward
from rdkv.runtime.engine.runner import WARM_UP, Runner
from rdkv.runtime.engine.sampling import Sampling

from . import synthetic, timing
from .baselines import short
from .compress import make_model
from .full_cache import FullBatch

Record = dict[str, Any]


class Memory:
    """The most that was allocated on the device since it was entered, weights included; 0 where there is no GPU."""

    def __enter__(self) -> Memory:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def now() -> float:
    """Time with the device idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def guarded(record: Record, name: str) -> Iterator[None]:
    """Note why a part of a record could not be measured."""
    record[f"{name}_reason"] = None
    try:
        yield
    except Exception as error:  # no memory, a library that is not installed, a kernel for another device
        record[f"{name}_reason"] = short(error)


def step_times(runner: Runner, steps: int) -> Record:
    """Median milliseconds of a step: with its tokens read by the host each time, and of steps one after the other."""
    for _ in range(WARM_UP + 2):
        runner.step()
    read = []
    for _ in range(steps):
        begin = now()
        runner.step()
        runner.tokens.tolist()
        read.append(1000 * (time.perf_counter() - begin))
    begin = now()
    for _ in range(steps):
        runner.step()
    queued = 1000 * (now() - begin) / steps
    return {"ms": round(median(read), 3), "queued_ms": round(queued, 3), "graph": runner.captured}


def ours(engine: Engine, prompt: Tensor, batch: int, steps: int, runs: int) -> Record:
    """The engine with a compressed cache."""
    record: Record = {}
    ids, greedy = prompt[0].tolist(), Sampling(max_new_tokens=1)
    firsts, reads, own = [], [], []
    document: Any = None
    with Memory() as memory:
        for _ in range(runs + 1):  # the first compiles kernels
            del document
            begin = now()
            document = engine.compress(ids)
            reads.append(now() - begin)
            own.append(document.cache.compress_seconds)
            engine.generate([[]], greedy, after=document)
            firsts.append(now() - begin)
        record |= {"prefill_s": round(median(reads[1:]), 4), "compress_s": round(median(own[1:]), 4)}
        record |= {"first_token_s": round(median(firsts[1:]), 4), "prefill_peak_bytes": memory.peak}
    record |= {"held_bytes": document.cache.prompt_nbytes, "full_bytes": document.cache.prompt_full_nbytes}
    with Memory() as memory:
        runner = Runner(engine.forward, cloned(document, batch), logits_of(document, batch), [Sampling()] * batch)
        del document
        record |= step_times(runner, steps) | {"decode_peak_bytes": memory.peak}
    return record


@torch.inference_mode()
def cloned(document: CompressedPrompt, count: int) -> Batch:
    """A batch of ``count`` copies of a prompt, each with bytes of its own; one layer at a time exists twice."""
    batch = Batch([document.cache] * count)
    if count == 1:
        return batch
    for layer, held in zip(batch.layers, document.cache.compressed_layers, strict=True):
        segment: Any = held.segments[0][1]
        copies: list[Any] = [replace(segment, packed=synthetic.copy(segment.packed)) for _ in range(count)]
        joined = held.session.pipeline.format.join(copies, [[row] for row in range(count)])
        assert joined is not None
        layer.parts = [(slice(None), joined[1])]
    return batch


def logits_of(document: CompressedPrompt, count: int) -> Tensor:
    """``[B, V]`` for copies of a prompt."""
    assert document.logits is not None
    return document.logits.expand(count, -1)


def full(engine: Engine, tokens: int, batch: int, steps: int) -> Record:
    """The engine's step with a full 16-bit cache."""
    config, device = engine.model.config, str(engine.model.device)
    with Memory() as memory, torch.inference_mode():
        held: Any = FullBatch(config, batch, tokens, device, engine.model.dtype)
        logits = torch.zeros(batch, config.vocab_size, device=device)
        runner = Runner(engine.forward, held, logits, [Sampling()] * batch)
        times = step_times(runner, steps)
        return times | {"decode_peak_bytes": memory.peak, "attention": held.attends_by}


def transformers_loop(model: PreTrainedModel, prompt: Tensor, batch: int, steps: int) -> Record:
    """Greedy search as ``generate`` does it, with a `DynamicCache` and sdpa."""
    with Memory() as memory, torch.inference_mode():
        cache = DynamicCache(config=model.config)
        begin = now()
        logits = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        record = {"prefill_s": round(now() - begin, 4), "prefill_peak_bytes": memory.peak}
        if batch > 1:
            cache.batch_repeat_interleave(batch)
        token = logits[:, -1].argmax(-1, keepdim=True).expand(batch, 1)
        times = []
        for _ in range(steps + 2):
            begin = now()
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
            token.tolist()
            times.append(1000 * (time.perf_counter() - begin))
    return record | {"ms": round(median(times[2:]), 3), "decode_peak_bytes": memory.peak}


@torch.inference_mode()
def floor(engine: Engine, batch: int) -> Record:
    """Every product of a decode step with nothing between them, in one graph."""
    assert isinstance(engine.forward, FusedForward)
    decoder = engine.forward.decoder
    products: list[Callable[[Tensor], Tensor]] = []
    for layer in decoder.layers:
        products += [layer.qkv, layer.attention.o_proj, layer.gate_up, layer.mlp.down_proj]
    products.append(decoder.head)
    weights = [getattr(product, "weight") for product in products]  # noqa: B009
    inputs = [torch.randn(batch, w.shape[1], device=w.device, dtype=w.dtype) for w in weights]

    def run() -> None:
        for product, x in zip(products, inputs, strict=True):
            product(x)

    return {"ms": round(timing.milliseconds(run), 3), "bytes": sum(w.nbytes for w in weights)}


def measure(engine: Engine, tokens: int, batch: int, arguments: argparse.Namespace) -> Record:
    """Everything about one length and batch."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(engine.model.config.vocab_size, (1, tokens), generator=generator).to(engine.model.device)
    record: Record = {
        "kind": "engine",
        "tokens": tokens,
        "batch": batch,
        "layers": engine.model.config.num_hidden_layers,
        "budget": arguments.budget,
        "steps": arguments.steps,
        "runs": arguments.runs,
    }
    parts: dict[str, Callable[[], Record]] = {
        "floor": lambda: floor(engine, batch),
        "ours": lambda: ours(engine, prompt, batch, arguments.steps, arguments.runs),
        "full": lambda: full(engine, tokens, batch, arguments.steps),
        "transformers": lambda: transformers_loop(engine.model, prompt, batch, arguments.steps),
    }
    for name, part in parts.items():
        if name not in arguments.skip:
            with guarded(record, name):
                record |= {f"{name}_{key}": value for key, value in part().items()}
    return record


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--tokens", type=int, nargs="+", default=[4096, 32_768, 131_072])
    result.add_argument("--batch", type=int, nargs="+", default=[1])
    result.add_argument("--layers", type=int, default=32)
    result.add_argument("--budget", type=float, default=0.0248)
    result.add_argument("--steps", type=int, default=20, help="decode steps that are timed, at most 50")
    result.add_argument("--runs", type=int, default=2, help="prefills that are timed, after one that is not")
    result.add_argument("--skip", nargs="*", default=[], choices=["floor", "ours", "full", "transformers"])
    result.add_argument("--out", type=Path, required=True, help="file that lines are appended to")
    return result


def main() -> None:
    """The command line."""
    arguments = parser().parse_args()
    model, machine = make_model(arguments.layers, "cuda"), timing.machine()
    engine = Engine(model, rdkv.CompressionConfig(budget=arguments.budget, calibration="none"))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as out:
        for tokens in arguments.tokens:
            for batch in arguments.batch:
                record = measure(engine, tokens, batch, arguments)
                out.write(json.dumps(record | machine) + "\n")
                out.flush()
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
