"""Key widths as a path: from no bits in any channel to all bits in all, best gain per bit first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.ladder import Ladder
from .levels import thresholds


@dataclass(frozen=True)
class KeyPath:
    """The points of a head's path, ``j = 0 .. J``: the first ``j`` upgrades of channel groups made.

    Attributes:
        bits: ``[P, h, J+1]`` int64, bits of a coded token's key.
        overhead: ``[P, h, J+1]`` int64, bits of the channels' scales, zeros and means.
        loss: ``[P, h, J+1]`` float64, modelled distortion of the channels.
        group: ``[P, h, J]`` group that each upgrade raises.
        level: ``[P, h, J]`` level it reaches.
        channel: ``[P, h, D]`` channels by falling weight; groups are runs of it.
        sizes: ``[n]`` channels of each group.
    """

    bits: Tensor
    overhead: Tensor
    loss: Tensor
    group: Tensor
    level: Tensor
    channel: Tensor
    sizes: Tensor

    def widths(self, point: Tensor, key_bits: tuple[int, ...]) -> Tensor:
        """Width of each channel at ``point`` ``[P, h]``, ``[P, h, D]`` uint8."""
        made = torch.arange(self.group.shape[-1], device=point.device) < point.unsqueeze(-1)
        reached = torch.zeros((*point.shape, len(self.sizes)), dtype=torch.int64, device=point.device)
        reached.scatter_reduce_(-1, self.group, self.level.masked_fill(~made, 0), "amax")
        table = torch.tensor(key_bits, dtype=torch.uint8, device=point.device)
        sorted_bits = table[reached.repeat_interleave(self.sizes, -1)]  # [P, h, D]
        return torch.zeros_like(sorted_bits).scatter(-1, self.channel, sorted_bits)


def key_path(channel: Tensor, ladder: Ladder) -> KeyPath:
    """The path for channel weights ``[P, h, D]`` on the key levels of ``ladder``."""
    device = channel.device
    dim = channel.shape[-1]
    order = channel.argsort(dim=-1, descending=True, stable=True)
    starts = torch.arange(0, dim, ladder.channel_group, device=device)
    sizes = (dim - starts).clamp(max=ladder.channel_group)  # the last group may be short
    of_channel = torch.arange(dim, device=device) // ladder.channel_group
    weight = torch.zeros((*channel.shape[:2], len(sizes)), dtype=torch.float64, device=device)
    weight.index_add_(-1, of_channel, channel.gather(-1, order))

    price = torch.tensor(ladder.key_cost, device=device)  # bits a channel and token
    extra = torch.tensor(ladder.key_overhead, device=device)
    distortion = torch.tensor(ladder.key_distortion, dtype=torch.float64, device=device)
    bar = thresholds(price, distortion)  # [K-1]
    levels = bar.shape[0]
    # Gain per bit; groups differ in size only at the end, so weigh by channel. Upgrades of one group
    # stay in order: where levels share a threshold, a stable sort keeps the lower one first.
    worth = ((weight / sizes).unsqueeze(-1) / bar).flatten(2)  # [P, h, n * (K-1)]
    rank = worth.argsort(dim=-1, descending=True, stable=True)
    group, level = rank // levels, rank % levels + 1
    size = sizes[group]
    first = torch.zeros((*rank.shape[:2], 1), dtype=rank.dtype, device=device)
    step_bits = size * (price[level] - price[level - 1])
    step_extra = size * (extra[level] - extra[level - 1])
    step_gain = weight.gather(-1, group) * (distortion[level - 1] - distortion[level])
    # Summed from the end, so that what little is left after many upgrades is not lost to rounding.
    left = torch.cat([step_gain, first.double()], -1).flip(-1).cumsum(-1).flip(-1)
    return KeyPath(
        bits=torch.cat([first, step_bits], -1).cumsum(-1) + dim * price[0],
        overhead=torch.cat([first, step_extra], -1).cumsum(-1) + dim * extra[0],
        loss=left + weight.sum(-1, keepdim=True) * distortion[-1],
        group=group,
        level=level,
        channel=order,
        sizes=sizes,
    )
