"""What one step up the ladder is worth, for every width that a head's key may have; made once for a ladder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels.naive_filling import NEVER
from ..runtime.ladder import Ladder
from .levels import hull, thresholds

NO_TOKENS = 0  # row of a head without tokens; row ``1 + u`` is that of keys of ``u`` times ``key_block`` bits


@dataclass(frozen=True)
class Steps:
    """The steps of an item, a block of tokens, from each hull level to the next; ``S`` is the levels less one.

    ``[..., S]`` float64 each. A level off the hull has no step: 0 bits, 0 gain, and the bar of the level below.

    Attributes:
        bar: least ``weight / water level`` at which the step is made.
        price: bits of the step.
        toll: the same, and `NEVER` where there is no step.
        gain: distortion that the step saves for each unit of weight.
        rate: gain per bit.
        limit: highest boundary: the first step of a head in use is made by the heaviest item, worth it or not.
        width: ``[..., S + 1]`` width of a value after so many steps.
        base: ``[..., 1]`` bits of an item that makes no step.
        whole: ``[..., 1]`` bits of all steps of all items.
    """

    bar: Tensor
    price: Tensor
    toll: Tensor
    gain: Tensor
    rate: Tensor
    limit: Tensor
    width: Tensor
    base: Tensor
    whole: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Steps:
        """The columns of ``rows`` ``[..., F]``."""
        steps = (rows.shape[-1] - 3) // 7
        return cls(*torch.split(rows, [steps] * 6 + [steps + 1, 1, 1], -1))


@dataclass(frozen=True)
class StepTable:
    """``rows`` ``[N + 2, F]``: a head without tokens, then keys of 0 to ``N`` times ``key_block`` bits.

    ``octaves``: log2 of the highest bar.
    """

    rows: Tensor
    octaves: float


def step_table(ladder: Ladder, items: int, device: torch.device) -> StepTable:
    """The table for ``items`` items a head, kept on ``device``: making one there takes many small operations."""
    return _step_table(essence(ladder), items, device)


def essence(ladder: Ladder) -> Ladder:
    """The ladder without what a choice of widths does not depend on."""
    return replace(ladder, head_cost=0, full_cost=0, pinned_cost=0)


def key_units(ladder: Ladder) -> int:
    """``key_block`` in the widest key."""
    return -(-ladder.head_dim * ladder.key_cost[-1] // ladder.key_block)


@lru_cache(maxsize=64)
def _step_table(ladder: Ladder, items: int, device: torch.device) -> StepTable:
    bits, value = torch.tensor(ladder.value_bits), torch.tensor(ladder.value_cost)
    distortion = torch.tensor(ladder.value_distortion, dtype=torch.float64)
    if len(bits) == 1:  # nothing to decide: one step that is never made
        bits, value, distortion = bits.repeat(2), value.repeat(2), distortion.repeat(2)
    key = torch.arange(key_units(ladder) + 1) * ladder.key_block  # [N + 1]
    cost = ladder.token_block * (value + (bits > 0) * key.unsqueeze(-1))  # [N + 1, S + 1]
    bar = thresholds(cost, distortion)  # [N + 1, S]
    on = hull(bar) & bar.isfinite()
    level = torch.where(on, torch.arange(1, len(bits)), 0).cummax(-1).values  # hull level at or below each level
    level = torch.cat([torch.zeros_like(level[:, :1]), level], -1)  # [N + 1, S + 1]
    below = level[:, :-1]
    price = (cost[:, 1:] - cost.gather(-1, below)).double() * on
    bar = torch.where(on, bar, 0.0).cummax(-1).values
    first = bar == bar.masked_fill(~on, float("inf")).amin(-1, keepdim=True)
    toll = price.masked_fill(~on, NEVER)
    gain = (distortion[below] - distortion[1:]) * on
    limit = items - (first & (bits[0] == 0)).double()
    whole = price.sum(-1, keepdim=True) * items
    rows = torch.cat([bar, price, toll, gain, gain / toll, limit, bits[level], cost[:, :1], whole], -1)
    nothing = torch.zeros_like(rows[:1])
    columns = Steps.of(nothing)  # views: no item is worth a step, and all lose what they can
    columns.bar[:], columns.toll[:], columns.limit[:], columns.width[:] = float("inf"), NEVER, items, bits[0]
    columns.gain[:, 0] = distortion[0] - distortion[-1]
    octaves = float(bar.amax().clamp(min=1.0).log2())
    return StepTable(torch.cat([nothing, rows]).to(device), octaves)
