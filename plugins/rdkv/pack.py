"""Packing a layer's keys and values: with the Triton kernels where there is a GPU, else in plain PyTorch."""

from __future__ import annotations

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


def pack(keys: Tensor, values: Tensor, plan: BitPlan, keep_positions: bool) -> PackedSegment:
    """Pack ``keys`` and ``values`` ``[B, H, T, D]`` at the widths of ``plan``.

    Raises:
        PluginError: what is to be quantised is not finite.
    """
    batch, heads, tokens, dim = keys.shape
    packed = _pack(keys, values, plan)
    if packed.slots == 0:
        return EmptySegment(batch, heads, tokens, dim, keys.device)
    # The device is asked whether the plan keeps everything only where the counts allow it.
    if all(row[PINNED] == tokens for row in packed.host_counts) and plan.is_identity:
        return WholeSegment(packed.pinned_keys.reshape(keys.shape), packed.pinned_values.reshape(values.shape))
    return MixedBitSegment(packed, tokens, _positions(packed, plan) if keep_positions else None)


def _pack(keys: Tensor, values: Tensor, plan: BitPlan) -> Packed:
    try:
        if not triton_takes(keys):
            return naive_pack.pack(keys, values, plan.value_bits, plan.key_bits, plan.pinned)
        from ...kernels import pack  # not above: it needs Triton

        return pack.pack(keys, values, plan.value_bits, plan.key_bits, plan.pinned)
    except NotFiniteError as error:
        raise PluginError(str(error)) from error


def _positions(packed: Packed, plan: BitPlan) -> Positions:
    raw = sum(packed.raw)
    kept = sum(row[TOKENS] for row in packed.host_counts) + raw
    pinned = sum(row[PINNED] for row in packed.host_counts) - raw
    return Positions.of(plan.value_bits.flatten(0, 1), plan.pinned.flatten(0, 1), kept, pinned)
