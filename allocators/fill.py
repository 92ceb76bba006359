"""Filling a budget with steps of items, best gain per bit first."""

from __future__ import annotations

from torch import Tensor

from ..kernels import naive_filling
from ..kernels.available import kernels_for
from .steps import Steps
from .waterlevel import Search

ROUNDS = 3  # of a search through all water levels for the order of any two steps


def fill(
    weight: Tensor, steps: Steps, need: Tensor, anchored: bool, water: Tensor, search: Search, rounds: int
) -> Tensor:
    """Steps that save most distortion: ``[P, h, S]`` int64, index of the lightest item that makes each step.

    Steps are made in order of gain per bit, which is the Lagrangian optimum for the bits they take, then those
    that still fit, in the same order. The water level where the budget ends is searched for in ``rounds`` rounds;
    steps within the last interval count as worth the same, and are made in proportion.

    Args:
        weight: ``[P, h, n]`` float64, ascending.
        steps: of each head, ``[P, h, S]``.
        need: ``[P, 1]`` float64, bits that steps not made have to save: those of all steps less what is available.
        anchored: whether each head with steps makes its first before any head makes more.
        water: ``[P, L]`` or ``[1, L]``, falling water levels of the first round.
    """
    kernels = kernels_for("filling", weight)
    columns = (steps.bar, steps.price, steps.limit if anchored else None)
    for _ in range(rounds - 1):
        water = kernels.narrowed(weight, *columns, water, need, search.unit)
    boundary: Tensor = kernels.settled(weight, *columns, water, need)
    for _ in range(rounds):
        boundary = kernels.spend(weight, steps.price, steps.toll, steps.rate, boundary, need)
    return boundary


def unspent(steps: Steps, boundary: Tensor, need: Tensor) -> Tensor:
    """Bits that are left, ``[P, 1]`` float64; negative where even the dearest water level was not affordable."""
    return naive_filling.unspent(steps.price, boundary, need)
