"""The ladder of a cache format: its bit-widths, what they lose, and what a plan costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import msgspec
import torch
from torch import Tensor

from ..kernels import naive_checking
from ..kernels.naive_checking import NO_WIDTH, Prices
from .errors import ConfigError
from .plan import BitPlan


class Distortion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Calibrated distortions: width in bits to normalised squared error, for values and keys."""

    value: dict[int, float]
    key: dict[int, float]


@dataclass(frozen=True)
class Ladder:
    """The bit-widths of a cache format, what they lose and what they cost, in bits.

    Costs are exact up to rounding to whole bytes, which ``head_cost`` reserves: a plan that ``cost``
    finds within the budget is within the budget once packed.

    Attributes:
        head_dim: ``D``.
        value_bits, key_bits: levels, ascending, from 0 to 16.
        value_distortion, key_distortion: normalised squared error at each level, 1 at 0 bits, 0 at 16.
        value_cost: bits of one kept token's value with its metadata; its key comes on top.
        key_cost: bits of one key channel for each kept token that is not pinned.
        key_overhead: bits of one key channel however many tokens it covers (scale, zero point, mean).
        pinned_cost: bits of one pinned token, key and value and metadata.
        head_cost: bits of one head whatever the plan, for its prompt length ``T``; nothing if no head
            of a layer keeps a token.
        full_cost: bits of one head when nothing is compressed.
        channel_group: channels share a width in groups of this many, in order of falling weight.
        token_block: quantised tokens are stored in blocks of this many (see `prices`).
        key_block: bits of a token's key are rounded up to a multiple of this.
    """

    head_dim: int
    value_bits: tuple[int, ...]
    value_distortion: tuple[float, ...]
    value_cost: tuple[int, ...]
    key_bits: tuple[int, ...]
    key_distortion: tuple[float, ...]
    key_cost: tuple[int, ...]
    key_overhead: tuple[int, ...]
    pinned_cost: int
    head_cost: int
    full_cost: int
    channel_group: int = 1
    token_block: int = 1
    key_block: int = 1

    def restrict(self, bits: tuple[int, ...]) -> Ladder:
        """The same ladder with only the widths in ``bits``, for values and keys alike.

        Raises:
            ConfigError: a width the format lacks, or none left for values or keys.
        """
        known = set(self.value_bits) | set(self.key_bits)
        if unknown := [b for b in bits if b not in known]:
            raise ConfigError(
                f"ladder: the cache format has no width of {unknown[0]} bits; "
                f"it has {', '.join(map(str, sorted(known)))}"
            )
        value = [i for i, b in enumerate(self.value_bits) if b in bits]
        key = [i for i, b in enumerate(self.key_bits) if b in bits]
        if not value or not key:
            raise ConfigError("ladder: it needs at least one width that values have and one that keys have")
        return replace(
            self,
            value_bits=tuple(self.value_bits[i] for i in value),
            value_distortion=tuple(self.value_distortion[i] for i in value),
            value_cost=tuple(self.value_cost[i] for i in value),
            key_bits=tuple(self.key_bits[i] for i in key),
            key_distortion=tuple(self.key_distortion[i] for i in key),
            key_cost=tuple(self.key_cost[i] for i in key),
            key_overhead=tuple(self.key_overhead[i] for i in key),
        )

    def cost(self, plan: BitPlan) -> Tensor:
        """Bits that ``plan`` takes once packed, ``[B, H]`` int64, rounding to whole bytes included."""
        return naive_checking.cost(plan.value_bits, plan.key_bits, plan.pinned, self.prices(plan.value_bits.device))

    def prices(self, device: torch.device) -> Prices:
        """What `cost` needs, on a device.

        A value is stored in layers of bits, one layer for each step of the ladder: the layer of a width holds
        the tokens of this width and above in whole blocks, and so do the keys.
        """
        layers = tuple(step * self.head_dim for step in _steps(self.coded_bits))
        return Prices(
            widths=_counted(self.coded_bits, device),
            values=_numbers(_steps(self.coded_costs), device),
            layers=_numbers(layers, device),
            channels=_channel_table(self.key_bits, self.key_cost, self.key_overhead, device),
            value_odd=_odd_widths(self.value_bits, device),
            key_odd=_odd_widths(self.key_bits, device),
            pinned_cost=self.pinned_cost,
            head_cost=self.head_cost,
            full_cost=self.full_cost,
            token_block=self.token_block,
            key_block=self.key_block,
        )

    @property
    def coded_bits(self) -> tuple[int, ...]:
        """Widths of the values that are kept, ascending."""
        return tuple(b for b in self.value_bits if b > 0)

    @property
    def coded_costs(self) -> tuple[int, ...]:
        """Their costs."""
        return tuple(cost for b, cost in zip(self.value_bits, self.value_cost, strict=True) if b > 0)


def _steps(rising: tuple[int, ...]) -> tuple[int, ...]:
    """What each number adds to the one before it; the first adds all of itself."""
    return tuple(b - a for a, b in zip((0, *rising), rising, strict=False))


# Tensors of constants are made once: while one is sent to a GPU the GPU is waited for.


@cache
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


@cache
def _counted(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """``[C + 2, 1]`` uint8: ``levels``, 1 and 16."""
    return torch.tensor((*levels, 1, 16), dtype=torch.uint8, device=device).unsqueeze(1)


@cache
def _channel_table(
    levels: tuple[int, ...], cost: tuple[int, ...], overhead: tuple[int, ...], device: torch.device
) -> Tensor:
    """``[256, 2]``, by width: bits of a channel for each token, and once."""
    table = torch.zeros(256, 2, dtype=torch.int64)
    table[list(levels)] = torch.tensor([cost, overhead]).T
    return table.to(device)


@cache
def _odd_widths(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """``[256]``: every width itself, but ``NO_WIDTH`` for those of ``levels``."""
    table = torch.arange(NO_WIDTH)
    table[list(levels)] = NO_WIDTH
    return table.to(device)
