"""Packing a layer's keys and values: with the Triton kernels where there is a GPU, else in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...kernels import naive_pack
from ...kernels.available import triton_takes
from ...kernels.packed import PINNED, TOKENS, NotFiniteError, Packed
from ...runtime.errors import PluginError
from ...runtime.interfaces import PackedSegment
from ...runtime.plan import BitPlan
from .positions import Positions
from .segment import MixedBitSegment
from .whole import EmptySegment, WholeSegment


def begin(
    keys: Tensor, values: Tensor, plan: BitPlan, rotate: bool, keep_positions: bool
) -> Callable[[], PackedSegment]:
    """Begin to pack ``keys`` and ``values`` ``[B, H, T, D]`` at the widths of ``plan``; what it returns finishes that.

    A GPU is not waited for before that; without one there is nothing to gain, and all is done here.

    Raises:
        PluginError: what is to be quantised is not finite; here or from what it returns.
    """
    arguments = (keys, values, plan.value_bits, plan.key_bits, plan.pinned, rotate)
    if triton_takes(keys):
        from ...kernels import pack  # not above: it needs Triton

        return partial(_finish, pack.begin(*arguments).finish, keys.shape, plan, keep_positions)
    segment = _finish(partial(naive_pack.pack, *arguments), keys.shape, plan, keep_positions)
    return lambda: segment


def _finish(packer: Callable[[], Packed], shape: torch.Size, plan: BitPlan, keep_positions: bool) -> PackedSegment:
    """The segment of what ``packer`` packs."""
    try:
        packed = packer()
    except NotFiniteError as error:
        raise PluginError(str(error)) from error
    batch, heads, tokens, dim = shape
    if packed.slots == 0:
        return EmptySegment(batch, heads, tokens, dim, packed.counts.device)
    # The device is asked whether the plan keeps everything only where the counts allow it.
    if all(row[PINNED] == tokens for row in packed.host_counts) and plan.is_identity:
        return WholeSegment(packed.pinned_keys.reshape(shape), packed.pinned_values.reshape(shape))
    return MixedBitSegment(packed, tokens, _positions(packed, plan) if keep_positions else None)


def _positions(packed: Packed, plan: BitPlan) -> Positions:
    raw = sum(packed.raw)
    kept = sum(row[TOKENS] for row in packed.host_counts) + raw
    pinned = sum(row[PINNED] for row in packed.host_counts) - raw
    return Positions.of(plan.value_bits.flatten(0, 1), plan.pinned.flatten(0, 1), kept, pinned)
