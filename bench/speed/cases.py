"""Which decode steps are timed: shapes of a layer, budgets and mixes, the most wanted ones first."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from .sizes import MIXES, SPREAD, Sizes, make_mix, plan_sizes

# Batch, tokens, budget and mix of what is measured first.
FIRST: list[tuple[int, int, float | None, str]] = [
    (16, 131072, 0.0248, "smollm2"),
    (64, 131072, 0.0248, "smollm2"),
    (1, 131072, 0.0248, "smollm2"),
    (16, 32768, None, "4bit"),
]


@dataclass(frozen=True)
class Shape:
    """One layer of a model, and what it serves: sequences of so many tokens."""

    batch: int
    tokens: int
    heads: int
    group: int
    dim: int

    @property
    def full_bytes(self) -> int:
        """Bytes of the layer's keys and values at 16 bits."""
        return 4 * self.batch * self.heads * self.tokens * self.dim


@dataclass(frozen=True)
class Case:
    """One decode step over packed prompts.

    Attributes:
        budget: fraction of the full cache's bytes; None where all tokens are kept.
        mix: one of `MIXES`.
        spread: as of `plan_sizes`.
    """

    shape: Shape
    budget: float | None
    mix: str
    spread: float | None = SPREAD

    def sizes(self) -> Sizes:
        """What the prompts pack to."""
        shape, budget = self.shape, 1.0 if self.budget is None else self.budget
        mix = make_mix(self.mix, budget)
        return plan_sizes(shape.batch * shape.heads, shape.dim, shape.tokens, budget, mix, self.spread)


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Every combination once, those of `FIRST` first."""
    grid = product(arguments.tokens, arguments.batch, arguments.mix, arguments.budget)
    wanted = dict.fromkeys((b, t, None if mix == "4bit" else budget, mix) for t, b, mix, budget in grid)
    order = [key for key in FIRST if key in wanted] + [key for key in wanted if key not in FIRST]
    layer = arguments.heads, arguments.group, arguments.head_dim
    return [Case(Shape(b, t, *layer), budget, mix, arguments.spread) for b, t, budget, mix in order]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line's arguments; the layer of Llama-3.1-8B by default."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--tokens", type=several(int), default=[131072, 32768, 8192])
    result.add_argument("--batch", type=several(int), default=[16, 64, 1, 4])
    result.add_argument("--budget", type=several(float), default=[0.0248, 0.01, 0.05, 0.1])
    result.add_argument("--mix", type=several(_mix), default=list(MIXES))
    result.add_argument("--head-dim", type=int, default=128)
    result.add_argument("--heads", type=int, default=8, help="KV heads")
    result.add_argument("--group", type=int, default=4, help="query heads of a KV head")
    result.add_argument(
        "--spread", type=float, default=0.2, help="how far heads keep more or fewer tokens than the mean"
    )
    result.add_argument("--seconds", type=float, default=float("inf"), help="start no new case after this long")
    result.add_argument("--no-baselines", action="store_true", help="leave the other libraries out")
    result.add_argument("--out", type=Path, required=True, help="file that lines are appended to")
    return result


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def split(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return split


def _mix(name: str) -> str:
    if name not in MIXES:
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(MIXES)}")
    return name
