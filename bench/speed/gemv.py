"""Products of a decode step of one sequence: the fused ones beside their parts, and beside the time of reading.

    python -m bench.speed.gemv --out results.jsonl

Shapes of Llama-3.1-8B by default, random weights, bfloat16, copies of the weights enough that the L2 cache never has
the next. ``linear`` is the product alone by PyTorch, ``apart`` with norm, sum or activation as launches of their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rdkv.kernels import gemv, naive_gemv, step

from . import timing

EPS = 1e-5


class Product(NamedTuple):
    """A product of the step: rows and columns of its weights, and what it is fused with."""

    name: str
    rows: int
    columns: int
    fused_with: str


def products(hidden: int, inner: int, qkv: int, vocabulary: int) -> list[Product]:
    """Those of a decoder layer, and the head."""
    return [
        Product("qkv", qkv, hidden, "norm"),
        Product("o", hidden, hidden, "add"),
        Product("gate_up", 2 * inner, hidden, "gated"),
        Product("down", hidden, inner, "add"),
        Product("head", vocabulary, hidden, "norm"),
    ]


class Inputs(NamedTuple):
    """Vector ``[1, K]``, norm weights ``[K]`` of it, and residual ``[1, N]``."""

    x: Tensor
    norm: Tensor
    residual: Tensor


def ways(product: Product, given: Inputs, shape: gemv.Shape | None = None) -> dict[str, Callable[[Tensor], Any]]:
    """What is timed, given weights."""
    x, norm, residual = given
    linear, kind = torch.nn.functional.linear, product.fused_with
    weights_of_norm = torch.ones_like(residual[0])

    def added(weight: Tensor) -> None:
        step.add_norm(residual, linear(x, weight), weights_of_norm, EPS)

    fused: dict[str, Callable[[Tensor], Any]] = {
        "norm": lambda w: gemv.norm_gemv(x, norm, EPS, w, shape=shape),
        "gated": lambda w: gemv.gated_gemv(x, norm, EPS, w, shape=shape),
        "add": lambda w: gemv.add_gemv(residual, x, w, shape=shape),
    }
    apart: dict[str, Callable[[Tensor], Any]] = {
        "norm": lambda w: linear(x, w),  # the norm before it is counted with the sum
        "gated": lambda w: step.gated(linear(x, w)),
        "add": added,
    }
    return {"fused": fused[kind], "apart": apart[kind], "linear": lambda w: linear(x, w)}


def error(product: Product, given: Inputs, weight: Tensor) -> float:
    """Largest error of the fused product beside the twin in float64, over the largest number."""
    wide = [t.double() for t in (given.x, given.norm, given.residual, weight)]
    x, norm, residual, w = wide
    if product.fused_with == "add":
        mine = given.residual.clone()
        gemv.add_gemv(mine, given.x, weight)
        naive_gemv.add_gemv(residual, x, w)
        theirs = residual
    else:
        name = f"{product.fused_with}_gemv"
        mine = getattr(gemv, name)(given.x, given.norm, EPS, weight)
        theirs = getattr(naive_gemv, name)(x, norm, EPS, w)
    return float((mine.double() - theirs).abs().max() / theirs.abs().max())


def measure(product: Product, speed: float, device: str = "cuda") -> dict[str, Any]:
    """Microseconds of each way, the floor by ``speed`` bytes a second, and the error."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    nbytes = 2 * product.rows * product.columns
    weights = [draw(product.rows, product.columns) for _ in range(timing.copies(nbytes))]
    given = Inputs(draw(1, product.columns), draw(product.columns), draw(1, product.rows))
    record: dict[str, Any] = {"kind": "gemv", **product._asdict(), "bytes": nbytes}
    record["error"] = round(error(product, given, weights[0]), 6)
    record["floor_us"] = round(1e6 * nbytes / speed, 2)
    for name, run in ways(product, given).items():
        record[f"{name}_us"] = round(timing.microseconds(run, weights), 2)
    return record


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 4096), ("inner", 14_336), ("qkv", 6144), ("vocabulary", 128_256)):
        result.add_argument(f"--{name}", type=int, default=value)
    result.add_argument("--out", type=Path, required=True, help="file that lines are appended to")
    return result


def main() -> None:
    """The command line."""
    arguments = parser().parse_args()
    (speed, way), machine = timing.copy_bandwidth(), timing.machine()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sizes = (arguments.hidden, arguments.inner, arguments.qkv, arguments.vocabulary)
    with arguments.out.open("a") as out:
        for product in products(*sizes):
            record = measure(product, speed) | {"copy_bytes_per_s": round(speed), "copy_by": way}
            out.write(json.dumps(record | machine) + "\n")
            out.flush()
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
