"""Time of the scores of one layer: the window's kernels beside their twin in plain PyTorch, and the whole scorer.

python -m bench.speed.window --tokens 32768 131072 --heads 8 --groups 4 --dim 128 >> results.jsonl

Random keys and queries, bfloat16; the caches of the GPU are overwritten before each run. ``floor`` is the time
that reading the keys as often as the kernel does takes at the copy bandwidth measured in the same process.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rdkv.kernels import naive_window, window
from rdkv.plugins.rdkv.scorer import AttentionDistortion
from rdkv.runtime.checks import defuse, examine_scores
from rdkv.runtime.observation import Observation

from . import timing


def milliseconds(run: Callable[[], Any], times: int = 20) -> float:
    """Median time of a run on the GPU, the caches cold."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    spans = []
    for i in range(times + 3):
        flush.fill_(i)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in spans[3:])


def launches(run: Callable[[], Any]) -> int:
    """Kernels, copies and fills that a run puts on the device; it must not wait for any of them."""
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in record.events())


def extra_memory(run: Callable[[], Any]) -> float:
    """MiB at the peak of a run beyond what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / (1 << 20)


def measured(run: Callable[[], Any], nbytes: float, speed: float) -> dict[str, Any]:
    """Time, launches and memory of a run that reads so many bytes, at ``speed`` bytes a second at best."""
    return {
        "ms": round(milliseconds(run), 4),
        "floor_ms": round(1000 * nbytes / speed, 4),
        "launches": launches(run),
        "extra_mib": round(extra_memory(run), 1),
        "copy_bytes_per_s": round(speed),
    }


def observe(batch: int, tokens: int, heads: int, groups: int, dim: int) -> Observation:
    """A layer as a model leaves it, transposed views of ``[B, T, H, D]``."""

    def draw(count: int) -> Tensor:
        return torch.randn(batch, tokens, count, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    return Observation(draw(heads), draw(heads), draw(heads * groups), dim**-0.5, 0)


def cases(observation: Observation, width: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is timed, and how often each reads the keys."""
    queries, keys, scale = observation.window_queries(width), observation.keys, observation.scale
    scorer = AttentionDistortion()

    def checked() -> None:
        scores = scorer.score(observation)
        defuse(scores, examine_scores(scores, observation, "attention-distortion"))

    return {
        "moments": (lambda: window.token_moments(queries, keys, scale, "max"), 2),
        "moments, plain PyTorch": (lambda: naive_window.token_moments(queries, keys, scale, "max"), 2),
        "key statistics": (lambda: window.key_statistics(keys), 1),
        "key statistics, plain PyTorch": (lambda: naive_window.key_statistics(keys), 1),
        "scorer": (lambda: scorer.score(observation), 3),
        "scorer with checks": (checked, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768, 131_072])
    for name, value in (("batch", 1), ("heads", 8), ("groups", 4), ("dim", 128), ("window", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    (speed, way), machine = timing.copy_bandwidth(), timing.machine()
    for tokens in arguments.tokens:
        observation = observe(arguments.batch, tokens, arguments.heads, arguments.groups, arguments.dim)
        for name, (run, reads) in cases(observation, arguments.window).items():
            record = vars(arguments) | {"tokens": tokens, "what": name}
            record |= measured(run, reads * observation.keys.nbytes, speed) | {"copy_by": way}
            print(json.dumps(record | machine), flush=True)


if __name__ == "__main__":
    main()
