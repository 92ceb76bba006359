"""The water level that prices tokens and key channels alike, and the key widths it buys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.interfaces import Ladder
from .keypath import KeyPath
from .levels import thresholds
from .problem import Problem

# Each round tries this many water levels between two neighbours of the last: 2^80 is narrowed to a
# factor of 1 + 1e-8, far less than what parts two upgrades, without a look at the device.
CANDIDATES = 48
ROUNDS = 6


@dataclass(frozen=True)
class KeyPoints:
    """A choice of key widths: ``point`` ``[P, h]`` on each head's path, and the heads ``used`` ``[P, h]``."""

    point: Tensor
    used: Tensor


def key_points(problem: Problem, ladder: Ladder, path: KeyPath, key_weight: float) -> tuple[KeyPoints, KeyPoints]:
    """Key widths at the lowest water level whose bits are affordable, and just below it.

    For water level ``l`` a head takes the point ``j`` that minimises ``loss + l * bits``, its tokens
    taking the best levels given the point: with sorted weights both are a few look-ups in prefix sums.
    The two differ where many weights tie or a key upgrade jumps; then either may fill the budget better.
    """
    table = _Table(problem, ladder, path, key_weight)
    high = table.highest()  # [P, 1]: nothing is worth a bit
    low = high * 2.0**-80
    for _ in range(ROUNDS):
        grid = torch.linspace(0, 1, CANDIDATES, dtype=torch.float64, device=high.device)
        water = high * (low / high) ** grid  # [P, L], falling
        point, bits, kept = table.best(water)
        # Bits grow as the level falls; the last affordable candidate and its successor bracket the rest.
        above = (bits <= problem.available.unsqueeze(1)).sum(1, keepdim=True).clamp(min=1) - 1  # [P, 1]
        below = (above + 1).clamp(max=CANDIDATES - 1)
        high, low = water.gather(1, above), water.gather(1, below)

    def at(table: Tensor, candidate: Tensor) -> Tensor:
        return table.gather(2, candidate.unsqueeze(1).expand(-1, table.shape[1], 1)).squeeze(2)

    used = at(kept, below) > 0
    lower = at(point, below)
    upper = torch.where(at(kept, above) > 0, at(point, above), lower)
    return KeyPoints(upper, used), KeyPoints(lower, used)


class _Table:
    """Prefix sums from which the best point at any water level is read."""

    def __init__(self, problem: Problem, ladder: Ladder, path: KeyPath, key_weight: float) -> None:
        device = problem.token.device
        self.path, self.key_weight = path, key_weight
        ranked = problem.token.masked_fill(~problem.free, -1.0).sort(-1).values  # [P, h, T] ascending
        self.negated = -ranked.flip(-1).contiguous()  # ascending again: heaviest first
        zero = torch.zeros_like(ranked[..., :1])
        self.mass = torch.cat([zero, (-self.negated).clamp(min=0).cumsum(-1)], -1)  # of the n heaviest
        self.free = problem.free.sum(-1)  # [P, h]
        value = torch.tensor(ladder.value_cost, device=device)
        kept = torch.tensor(ladder.value_bits, device=device) > 0
        self.cost = value + kept * path.bits.unsqueeze(-1)  # [P, h, J, K]
        self.distortion = torch.tensor(ladder.value_distortion, dtype=torch.float64, device=device)
        self.bar = thresholds(self.cost, self.distortion)  # [P, h, J, K-1]
        self.keeps_all = ladder.value_bits[0] > 0

    def highest(self) -> Tensor:
        heaviest = -self.negated[..., 0]
        top = (heaviest / self.bar[..., 0].amin(-1)).amax(1, keepdim=True)
        # A level at which no key upgrade pays either: even the cheapest, for a single token.
        gain = self.key_weight * (self.path.loss[..., :1] - self.path.loss[..., -1:]).amax((1, 2)).unsqueeze(1)
        return (top + gain).clamp(min=1e-300) * 2.0

    def best(self, water: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At each level of ``water`` ``[P, L]``: best point ``[P, h, L]``, bits of all heads ``[P, L]``,
        tokens each head keeps ``[P, h, L]``."""
        problems, heads = self.bar.shape[:2]
        bar = self.bar.unsqueeze(2) * water[:, None, :, None, None]  # [P, h, L, J, K-1]
        counts = torch.searchsorted(self.negated, -bar.reshape(problems, heads, -1), right=True)
        counts = torch.minimum(counts, self.free.unsqueeze(-1))
        gained = self.mass.gather(-1, counts).reshape(bar.shape)
        counts = counts.reshape(bar.shape)
        rise = (self.cost[..., 1:] - self.cost[..., :-1]).unsqueeze(2)
        base = (self.cost[..., 0] * self.free.unsqueeze(-1)).unsqueeze(2)  # [P, h, 1, J]
        kept = self.free[..., None, None].expand(counts.shape[:-1]) if self.keeps_all else counts[..., 0]
        bits = base + (counts * rise).sum(-1) + self.path.overhead.unsqueeze(2) * (kept > 0)
        loss = self.path.loss.unsqueeze(2) * self.key_weight
        loss = loss - (gained * (self.distortion[:-1] - self.distortion[1:])).sum(-1)
        point = (loss + water[:, None, :, None] * bits).argmin(-1, keepdim=True)  # [P, h, L, 1]
        return point.squeeze(-1), bits.gather(-1, point).squeeze(-1).sum(1), kept.gather(-1, point).squeeze(-1)
