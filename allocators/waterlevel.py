"""The water level that prices tokens and key channels alike, and the key widths it buys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.ladder import Ladder
from .keypath import KeyPath
from .levels import thresholds
from .problem import Problem

# Each round tries this many water levels between two neighbours of the last: 2^80 is narrowed to a
# factor of 1 + 2e-7, less than what parts two upgrades, without a look at the device.
CANDIDATES = 128
ROUNDS = 4


@dataclass(frozen=True)
class KeyPoints:
    """A choice of key widths: ``point`` ``[P, h]`` on each head's path, and the heads ``used`` ``[P, h]``.

    A head in use holds a coded token at least; its channels' overhead is paid.
    """

    point: Tensor
    used: Tensor


def key_points(problem: Problem, ladder: Ladder, path: KeyPath, key_weight: float) -> tuple[KeyPoints, KeyPoints]:
    """Key widths at the lowest water level whose bits are affordable, and just below it.

    For water level ``l`` a head takes the point ``j`` that minimises ``loss + l * bits``, its tokens
    taking the best levels given the point: with sorted weights both are a few look-ups in prefix sums.
    Or it holds no token, for no bits and the loss of all its channels. Each choice is the minimum over
    one set of plans, so that a lower level never gives fewer bits or a greater loss.
    The two differ where many weights tie or a key upgrade jumps; then either may fill the budget better.
    """
    table = _Table(problem, ladder, path, key_weight)
    high = table.highest()  # [P, 1]: nothing is worth a bit
    low = high * 2.0**-80
    for _ in range(ROUNDS):
        grid = torch.linspace(0, 1, CANDIDATES, dtype=torch.float64, device=high.device)
        water = high * (low / high) ** grid  # [P, L], falling
        point, bits, used = table.best(water)
        # Bits grow as the level falls; the last affordable candidate and its successor bracket the rest.
        above = (bits <= problem.available.unsqueeze(1)).sum(1, keepdim=True).clamp(min=1) - 1  # [P, 1]
        below = (above + 1).clamp(max=CANDIDATES - 1)
        high, low = water.gather(1, above), water.gather(1, below)

    def at(table: Tensor, candidate: Tensor) -> Tensor:
        return table.gather(2, candidate.unsqueeze(1).expand(-1, table.shape[1], 1)).squeeze(2)

    return KeyPoints(at(point, above), at(used, above)), KeyPoints(at(point, below), at(used, below))


class _Table:
    """Prefix sums from which the best point at any water level is read."""

    def __init__(self, problem: Problem, ladder: Ladder, path: KeyPath, key_weight: float) -> None:
        device = problem.token.device
        self.path, self.key_weight = path, key_weight
        ranked = problem.token.masked_fill(~problem.free, -1.0).sort(-1).values  # [P, h, T] ascending
        self.negated = -ranked.flip(-1).contiguous()  # ascending again: heaviest first
        zero = torch.zeros_like(ranked[..., :1])
        # Of all but the n heaviest, summed from the lightest: a difference from the total would be lost to rounding.
        self.mass = torch.cat([zero, ranked.clamp(min=0).cumsum(-1)], -1).flip(-1).contiguous()
        self.free = problem.free.sum(-1)  # [P, h]
        value = torch.tensor(ladder.value_cost, device=device)
        kept = torch.tensor(ladder.value_bits, device=device) > 0
        self.cost = value + kept * path.bits.unsqueeze(-1)  # [P, h, J, K]
        self.distortion = torch.tensor(ladder.value_distortion, dtype=torch.float64, device=device)
        self.bar = thresholds(self.cost, self.distortion)  # [P, h, J, K-1]
        self.keeps_all = ladder.value_bits[0] > 0
        # A head in use holds its heaviest token at the first level of the hull, worth it or not.
        self.least = ((self.bar == self.bar[..., :1]) & (self.free > 0)[..., None, None]).long().unsqueeze(2)
        # Loss of a head without coded tokens, [P, h].
        self.unused = self.mass[..., 0] * self.distortion[0] + key_weight * problem.channel.sum(-1)

    def highest(self) -> Tensor:
        # No token is worth a bit to its value, nor all key channels of a head a single bit.
        first = self.bar[..., :1].amin(-2)  # [P, h, 1], or no level to rise to
        top = (-self.negated[..., :1] / first).sum(-1).amax(1, keepdim=True)
        return (top + self.unused.amax(1, keepdim=True)).clamp(min=1e-300) * 2.0

    def best(self, water: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At each level of ``water`` ``[P, L]``: best point ``[P, h, L]``, bits of all heads ``[P, L]``,
        heads that hold coded tokens ``[P, h, L]``."""
        problems, heads = self.bar.shape[:2]
        bar = self.bar.unsqueeze(2) * water[:, None, :, None, None]  # [P, h, L, J, K-1]
        counts = torch.searchsorted(self.negated, -bar.reshape(problems, heads, -1), right=True)
        counts = torch.minimum(counts, self.free.unsqueeze(-1)).reshape(bar.shape)
        if not self.keeps_all:
            counts = torch.maximum(counts, self.least)
        lost = self.mass.gather(-1, counts.flatten(2)).reshape(bar.shape)  # by tokens below each level
        rise = (self.cost[..., 1:] - self.cost[..., :-1]).unsqueeze(2)
        base = (self.cost[..., 0] * self.free.unsqueeze(-1)).unsqueeze(2)  # [P, h, 1, J]
        bits = base + (counts * rise).sum(-1) + self.path.overhead.unsqueeze(2)
        loss = (lost * (self.distortion[:-1] - self.distortion[1:])).sum(-1)
        loss = loss + self.mass[..., :1, None] * self.distortion[-1] + self.path.loss.unsqueeze(2) * self.key_weight
        value, point = (loss + water[:, None, :, None] * bits).min(-1)  # [P, h, L]
        used = (self.free > 0).unsqueeze(-1).expand(value.shape)
        if not self.keeps_all:
            used = used & (value < self.unused.unsqueeze(-1))
        bits = bits.gather(-1, point.unsqueeze(-1)).squeeze(-1).masked_fill(~used, 0)
        return point, bits.sum(1), used
