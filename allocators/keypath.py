"""Key widths as a path: from no bits in any channel to all bits in all, best gain per bit first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..runtime.ladder import Ladder
from .levels import thresholds
from .steps import essence


@dataclass(frozen=True)
class KeyPath:
    """The points of a head's path: point 0 is a head without tokens, point ``j`` has ``j - 1`` upgrades of groups made.

    Attributes:
        row: ``[P, h, J + 2]`` int64, of the table of steps: 0 for point 0, else 1 more than the bits of a coded token's
            key in units of ``key_block``.
        overhead: ``[P, h, J + 2]`` float64, bits of the channels' scales, zeros and means.
        loss: ``[P, h, J + 2]`` float64, modelled distortion of the channels; sums to 1 over the heads at no bits.
        place: ``[P, h, n, K - 1]`` int64, when each upgrade of each group is made: the first point after it.
        channel: ``[P, h, D]`` channels by falling weight; groups are runs of it.
    """

    row: Tensor
    overhead: Tensor
    loss: Tensor
    place: Tensor
    channel: Tensor

    def widths(self, point: Tensor, ladder: Ladder) -> Tensor:
        """Width of each channel at ``point`` ``[P, h]``, ``[P, h, D]`` uint8."""
        level = (self.place <= point.view(*point.shape, 1, 1)).sum(-1)  # [P, h, n]
        table = _constants(essence(ladder), level.device).widths
        bits = table[level].repeat_interleave(ladder.channel_group, -1)[..., : ladder.head_dim]
        return bits.scatter(-1, self.channel, bits)


def key_path(channel: Tensor, ladder: Ladder) -> KeyPath:
    """The path for channel weights ``[P, h, D]`` on the key levels of ``ladder``."""
    known = _constants(essence(ladder), channel.device)
    ranked, order = channel.sort(dim=-1, descending=True, stable=True)
    if short := -channel.shape[-1] % ladder.channel_group:
        ranked = pad(ranked, (0, short))
    weight = ranked.view(*ranked.shape[:2], -1, ladder.channel_group).sum(-1, True, dtype=torch.float64)
    # Gain per bit. Upgrades of one group stay in order: where levels share a threshold, a stable sort keeps the lower
    # one first; and equal channels tie in a short group too, since the product is exact and the quotient a whole's.
    even = weight * ladder.channel_group / known.sizes if short else weight  # [P, h, n, 1]
    rank = (even * known.pace).flatten(2).argsort(dim=-1, descending=True, stable=True)  # [P, h, J]
    weight = weight / weight.sum((1, 2), keepdim=True).clamp(min=1e-60)
    gain = (weight * known.drop).flatten(2).gather(-1, rank)
    # Not cumulative sums: what little is left after many upgrades is summed by itself, not lost to rounding.
    loss = gain @ known.left
    if ladder.key_distortion[-1] > 0:
        loss = loss + weight.sum(2) * ladder.key_distortion[-1]
    if ladder.value_bits[0] > 0:  # every head holds tokens
        loss[..., 0] = float("inf")
    steps = known.bits[:, rank].flatten(1, 2)  # [2, P * h, J]
    bits, overhead = torch.baddbmm(known.start, steps, known.made).view(2, *rank.shape[:2], -1).unbind(0)
    place = rank.scatter(-1, rank, known.place.expand(rank.shape)).view(*rank.shape[:2], *known.shape)
    return KeyPath((bits / ladder.key_block).ceil().long(), overhead, loss, place, order)


@dataclass(frozen=True)
class _Constants:
    """Upgrades of ``n`` groups through ``K`` levels: how soon each is made for its weight, what it saves and costs."""

    sizes: Tensor  # [n, 1]
    pace: Tensor  # [K - 1]: the gain per bit of a whole group is its weight times this, but for a factor
    drop: Tensor  # [K - 1]: distortion that an upgrade saves
    bits: Tensor  # [2, J]: of a token's key, and of the channels
    left: Tensor  # [J, J + 2]: which upgrades are not made at each point
    made: Tensor  # [2, J, J + 2]: which are, twice
    start: Tensor  # [2, 1, J + 2]: the same before any upgrade, the key's with one more block, as rows are counted
    place: Tensor  # [J]: the first point at which an upgrade is made
    widths: Tensor  # [K] uint8

    @property
    def shape(self) -> tuple[int, int]:
        """Groups, and upgrades of each."""
        return len(self.sizes), len(self.pace)


@lru_cache(maxsize=64)
def _constants(ladder: Ladder, device: torch.device) -> _Constants:
    dim = ladder.head_dim
    starts = torch.arange(0, dim, ladder.channel_group)
    sizes = (dim - starts).clamp(max=ladder.channel_group).unsqueeze(-1)  # [n, 1], the last may be short
    price, extra = torch.tensor(ladder.key_cost, dtype=torch.float64), torch.tensor(ladder.key_overhead).double()
    distortion = torch.tensor(ladder.key_distortion, dtype=torch.float64)
    bits = torch.stack([sizes * price.diff(), sizes * extra.diff()]).flatten(1)
    count = bits.shape[1]
    point, place = torch.arange(count + 2), torch.arange(2, count + 2)
    made = (place.unsqueeze(-1) <= point).double()
    start = torch.zeros(2, 1, count + 2, dtype=torch.float64)
    start[0, :, 1:], start[1, :, 1:] = dim * ladder.key_cost[0] + ladder.key_block, dim * ladder.key_overhead[0]
    widths = torch.tensor(ladder.key_bits, dtype=torch.uint8)
    pace, drop = 1 / thresholds(price, distortion), -distortion.diff()
    known = (sizes, pace, drop, bits, 1 - made, made.repeat(2, 1, 1), start, place, widths)
    return _Constants(*(t.to(device) for t in known))
