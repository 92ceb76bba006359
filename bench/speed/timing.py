"""Times on the GPU: the median of replays of a captured graph, and the copy bandwidth that floors are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any, TypeVar

import torch

from ..machine import describe

Layer = TypeVar("Layer")

SPAN_MS = 20.0  # of replays that are timed
FEWEST, MOST = 5, 20  # replays
STEPS = 8  # of a graph, at least
COLD = 3  # what a graph reads should be this many times the L2 cache


def capture(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of ``run``, after two runs outside it (compilation, allocation)."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def milliseconds(run: Callable[[], Any]) -> float:
    """Median time of a graph of ``run``: `FEWEST` to `MOST` replays, about `SPAN_MS` of them."""
    graph = capture(run)
    begin, end = _replay(graph)
    end.synchronize()
    count = min(MOST, max(FEWEST, math.ceil(SPAN_MS / begin.elapsed_time(end))))
    # Queued without waiting, so that all but the first begin as soon as the one before has ended.
    spans = [_replay(graph) for _ in range(count + 1)]
    torch.cuda.synchronize()
    times: list[float] = [begin.elapsed_time(end) for begin, end in spans[1:]]
    return median(times)


def _replay(graph: torch.cuda.CUDAGraph) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    return begin, end


def microseconds(step: Callable[[Layer], Any], layers: Sequence[Layer]) -> float:
    """Median time of a step on one layer, in graphs of at least `STEPS` that go round the layers."""
    rounds = math.ceil(STEPS / len(layers))

    def steps() -> None:
        for _ in range(rounds):
            for layer in layers:
                step(layer)

    return 1000 * milliseconds(steps) / (rounds * len(layers))


def copies(nbytes: int) -> int:
    """How many copies of ``nbytes`` it takes so that, one read after the other, the L2 cache never has the next."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, math.ceil(COLD * cache / nbytes))


def copy_bandwidth() -> tuple[float, str]:
    """Bytes a second, read and written, of the faster of two copies of 1 GiB, and which that was."""
    source = torch.zeros(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    ways: dict[str, Callable[[], Any]] = {
        "elementwise kernel (torch.neg)": lambda: torch.neg(source, out=target),
        "Tensor.copy_": lambda: target.copy_(source),
    }
    speeds = {name: 2e3 * source.nbytes / milliseconds(run) for name, run in ways.items()}
    best = max(speeds, key=lambda name: speeds[name])
    return speeds[best], best


def machine() -> dict[str, Any]:
    """The machine, with the versions of the libraries of kernels."""
    return {**describe(), "triton": installed("triton"), "flashinfer": installed("flashinfer-python")}


def installed(package: str) -> str | None:
    """Version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
