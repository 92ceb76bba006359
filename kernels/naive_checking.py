"""The meaning of `checking` in plain PyTorch: what the checks of scores and of plans ask the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NO_WIDTH = 256  # above what a byte holds


@dataclass(frozen=True)
class Prices:
    """What a cache format takes, in bits, as tensors of constants on the plan's device and numbers.

    Attributes:
        widths: ``[C + 2, 1]`` uint8, those of the values that are kept, ascending, then 1 and 16.
        values: ``[C]`` int64, what a value costs more than at the width below.
        layers: ``[C]`` int64, bits of the codes alone that each width adds.
        channels: ``[256, 2]`` int64, by width: bits of a key channel for each token, and once.
        value_odd, key_odd: ``[256]`` int64, every width itself, but ``NO_WIDTH`` for those of the format.
        pinned_cost, head_cost, full_cost, token_block, key_block: see `runtime.ladder.Ladder`.
    """

    widths: Tensor
    values: Tensor
    layers: Tensor
    channels: Tensor
    value_odd: Tensor
    key_odd: Tensor
    pinned_cost: int
    head_cost: int
    full_cost: int
    token_block: int
    key_block: int


def score_figures(token: Tensor, channel: Tensor) -> Tensor:
    """Least and greatest of both, ``[4]`` float64; NaN for both of one that has a NaN."""
    return torch.stack([*token.aminmax(), *channel.aminmax()]).double()


def sound_scores(token: Tensor, channel: Tensor, figures: Tensor) -> tuple[Tensor, Tensor]:
    """Both, or zeros where a figure says that some number is negative or not finite."""
    unsound = ~((figures >= 0) & (figures < float("inf"))).all()  # so for NaN
    return token.masked_fill(unsound, 0.0), channel.masked_fill(unsound, 0.0)


def plan_figures(
    value_bits: Tensor, key_bits: Tensor, pinned: Tensor, prices: Prices, each_head: bool, layers: int
) -> Tensor:
    """What a plan of ``layers`` layers, side by side in ``H``, uses and costs, ``[3 + layers]`` float64.

    Args:
        value_bits, key_bits, pinned: ``[B, H, T]`` uint8, ``[B, H, D]`` uint8, ``[B, H, T]`` bool.
        each_head: whether the dearest head is asked for, and not the dearest sequence.

    Returns:
        Least width of values and of keys that the format lacks, or ``NO_WIDTH``; bits of the dearest; of each layer.
    """
    odd = [table[bits.int()].amin() for table, bits in ((prices.value_odd, value_bits), (prices.key_odd, key_bits))]
    bits = cost(value_bits, key_bits, pinned, prices)  # [B, H]
    dearest = (bits if each_head else bits.sum(1)).amax()
    return torch.stack([*odd, dearest, *bits.reshape(bits.shape[0], layers, -1).sum((0, 2))]).double()


def sound_plan(value_bits: Tensor, key_bits: Tensor, pinned: Tensor, figures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The plan, or one that keeps nothing where its figures name a width that the format lacks."""
    sound = (figures[:2] == NO_WIDTH).all()
    return value_bits * sound, key_bits * sound, pinned & sound


def cost(value_bits: Tensor, key_bits: Tensor, pinned: Tensor, prices: Prices) -> Tensor:
    """Bits that a plan takes once packed, ``[B, H]`` int64; tensors as of `plan_figures`."""
    held = pinned.sum(-1)
    bits = value_bits.masked_fill(pinned, 0)
    # Tokens whose value has at least each of these widths; the last two: all that are coded, those at 16 bits.
    at_least = (bits.unsqueeze(-2) >= prices.widths).sum(-1)  # [B, H, C + 2]
    coded, wide = at_least[..., -2], at_least[..., -1]
    values = (at_least[..., :-2] * prices.values).sum(-1)
    key, overhead = prices.channels[key_bits.int()].sum(-2).unbind(-1)
    key = round_up(key, prices.key_block)
    # A head that quantises nothing stores its tokens beside the pinned ones, without blocks and channels.
    all_keys = (key_bits == 16).all(-1)
    blocked = at_least[..., :-1].masked_fill((all_keys & (wide == coded)).unsqueeze(-1), 0)
    overhead = overhead * (blocked[..., -1] > 0)
    free = -blocked % prices.token_block  # empty places of whole blocks
    padding = (free[..., :-1] * prices.layers).sum(-1)
    total = values + key * (coded + free[..., -1]) + padding + overhead + held * prices.pinned_cost + prices.head_cost
    # A layer that keeps nothing takes nothing, one that keeps all as it is no more than before. No `if`: the
    # plan may still be on its way on the device.
    identity = (all_keys & (wide + held == bits.shape[-1])).all()
    return total.masked_fill(identity, prices.full_cost) * (coded + held > 0).any()


def round_up(count: Tensor, block: int) -> Tensor:
    """The least multiple of ``block`` that is at least ``count``."""
    return count + -count % block
