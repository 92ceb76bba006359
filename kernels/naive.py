"""The meaning of every kernel, in plain PyTorch. Faster kernels are tested against these."""

from __future__ import annotations

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634

# Bound on the float32 logits that one call of `attention` holds at once, in elements (64 MiB).
CHUNK_ELEMENTS = 1 << 24


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes into bytes, the first code in the lowest bits.

    Args:
        codes: ``[..., n]`` uint8, each below ``2 ** bits``.
        bits: 1, 2, 4 or 8.

    Returns:
        ``[..., ceil(n * bits / 8)]`` uint8; unused high bits of the last byte are 0.
    """
    if bits == 8:
        return codes.contiguous()
    per_byte = 8 // bits
    if short := -codes.shape[-1] % per_byte:
        codes = torch.nn.functional.pad(codes, (0, short))
    lanes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (lanes << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: the first ``count`` codes, ``[..., count]`` uint8."""
    if bits == 8:
        return packed[..., :count]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count]


def affine_parameters(low: Tensor, high: Tensor, bits: int | Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float16, of an asymmetric uniform quantiser that covers ``[low, high]``.

    Both are rounded outwards, so that every value of the range lies within half a step of a level
    of the quantiser as stored, not as it was before rounding to 16 bits.

    Args:
        low, high: any shape, float32.
        bits: width of the codes, 1 to 16; one for all or broadcast against ``low``.
    """
    low, high = low.float(), high.float()
    zero = _half_below(low)
    # A tensor as divisor: CUDA turns division by a Python number into a product, with another rounding.
    steps = _largest_code(bits, low.device)
    return -_half_below(-(high - zero.float()) / steps), zero


def _largest_code(bits: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(bits, int):
        return torch.full((), 2**bits - 1, dtype=torch.float32, device=device)
    return ((1 << bits.int()) - 1).float()


def _half_below(x: Tensor) -> Tensor:
    """The largest float16 that is at most ``x``."""
    half = x.half()
    # Neighbouring floats have neighbouring bit patterns: away from zero is one up, towards it one down.
    raw = half.view(torch.int16)
    below = torch.where(half > 0, raw - 1, torch.where(half < 0, raw + 1, torch.full_like(raw, -0x7FFF)))
    return torch.where(half.float() > x, below.view(torch.float16), half)


def quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int | Tensor) -> Tensor:
    """Codes ``round((x - zero) / scale)`` clamped to the width, int32; a scale of 0 gives code 0.

    Args:
        x: any shape.
        scale, zero, bits: broadcast against ``x``.
    """
    scale = scale.float()
    steps = (x.float() - zero.float()) / torch.where(scale > 0, scale, 1.0)
    return torch.minimum(steps.round_().clamp_(min=0), _largest_code(bits, x.device)).int()


def attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention in float32 with its log-sum-exp, ``softmax(scale * q k^T) v``.

    Args:
        query: ``[B, H_q, Q, D]``; query head ``h * G + g`` reads KV head ``h``.
        keys, values: ``[B, H, N, D]``.
        scale: factor of the logits.
        visible: bool, broadcast against ``[B, H, Q, N]``; all if None.

    Returns:
        Output ``[B, H_q, Q, D]`` and log-sum-exp to base 2 ``[B, H_q, Q]``, both float32. A query that
        sees nothing gets output 0 and log-sum-exp minus infinity.
    """
    batch, q_heads, length, _ = query.shape
    heads, slots = keys.shape[1:3]
    if slots == 0:
        empty = query.new_zeros((batch, q_heads, length, values.shape[-1]), dtype=torch.float32)
        return empty, torch.full(query.shape[:3], float("-inf"), device=query.device)
    group = q_heads // heads
    grouped = query.float().reshape(batch, heads, group, length, -1)  # [B, H, G, Q, D]
    keys, values = keys.float(), values.float()
    step = max(1, CHUNK_ELEMENTS // (batch * q_heads * slots))
    outputs, lses = [], []
    for start in range(0, length, step):
        # The heads of a group are one product's rows: broadcasting would copy keys and values for each of them.
        rows = grouped[..., start : start + step, :].flatten(2, 3)
        logits = (torch.matmul(rows, keys.transpose(-1, -2)) * scale).reshape(batch, heads, group, -1, slots)
        if visible is not None:
            part = visible if visible.shape[-2] == 1 else visible[..., start : start + step, :]
            logits = logits.masked_fill(~part.unsqueeze(-3), float("-inf"))
        lse = logits.logsumexp(-1)  # [B, H, G, Q]
        weights = torch.exp(logits - lse.masked_fill(lse.isinf(), 0.0).unsqueeze(-1))
        output = torch.matmul(weights.flatten(2, 3), values)
        outputs.append(output.reshape(batch, heads, group, -1, values.shape[-1]))
        lses.append(lse * LOG2_E)
    return torch.cat(outputs, 3).flatten(1, 2), torch.cat(lses, 3).flatten(1, 2)


def merge_states(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of tokens from attention over each.

    Args:
        output_a, output_b: ``[..., D]`` float32.
        lse_a, lse_b: ``[...]`` log-sum-exp to base 2; minus infinity for an empty set.

    Returns:
        Output and log-sum-exp of the union, same shapes.
    """
    top = torch.maximum(lse_a, lse_b)
    top = top.masked_fill(top.isinf(), 0.0)  # both empty: keep the difference finite
    weight_a, weight_b = torch.exp2(lse_a - top), torch.exp2(lse_b - top)
    total = weight_a + weight_b
    norm = torch.where(total > 0, total, 1.0)
    output = (output_a * (weight_a / norm).unsqueeze(-1)) + (output_b * (weight_b / norm).unsqueeze(-1))
    return output, torch.log2(total) + top
