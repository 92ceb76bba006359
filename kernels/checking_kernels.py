"""Kernels of `checking`; `naive_checking` says what they compute. ``R`` rows, each one head of one sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from .naive_checking import NO_WIDTH

_SIZES = ["T", "D", "C", "rows", "heads", "layers", "tokens", "channels"]  # no kernel of its own for each
_COSTS = ["token_block", "key_block", "pinned_cost", "head_cost", "full_cost"]
_NO_WIDTH = tl.constexpr(NO_WIDTH)


@triton.jit
def _extremes(weights, count, BLOCK: tl.constexpr):
    """Least and greatest of ``count`` numbers, both NaN if one is."""
    low, high = tl.full([BLOCK], float("inf"), tl.float32), tl.full([BLOCK], float("-inf"), tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(weights + i, mask=i < count, other=float("inf"))
        low, broken = tl.minimum(low, tl.where(x == x, x, float("inf"))), broken | (x != x).to(tl.int32)
        x = tl.where(i < count, x, float("-inf"))
        high = tl.maximum(high, tl.where(x == x, x, float("-inf")))
    bad = tl.max(broken, 0) > 0
    return tl.where(bad, float("nan"), tl.min(low, 0)), tl.where(bad, float("nan"), tl.max(high, 0))


@triton.jit(do_not_specialize=_SIZES)
def score_rows_kernel(token, channel, parts, T, D, BLOCK: tl.constexpr, SMALL: tl.constexpr):
    """``parts`` ``[4, R]`` float32: extremes of both for each row."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    low, high = _extremes(token + row * T, T, BLOCK)
    tl.store(parts + row, low)
    tl.store(parts + rows + row, high)
    low, high = _extremes(channel + row * D, D, SMALL)
    tl.store(parts + 2 * rows + row, low)
    tl.store(parts + 3 * rows + row, high)


@triton.jit(do_not_specialize=_SIZES)
def score_figures_kernel(parts, figures, rows, BLOCK: tl.constexpr):
    """``figures`` ``[4]`` of all rows."""
    kind = tl.program_id(0)
    low, high = _extremes(parts + kind * rows, rows, BLOCK)
    tl.store(figures + kind, tl.where(kind % 2 == 0, low, high).to(tl.float64))


@triton.jit(do_not_specialize=_SIZES)
def sound_scores_kernel(
    token, channel, figures, sound_token, sound_channel, tokens, channels, BLOCK: tl.constexpr
):  # fmt: skip
    """Copies of some of both, or zeros."""
    i, ki = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, 4)
    figure = tl.load(figures + ki)
    sound = tl.sum(((figure >= 0) & (figure < float("inf"))).to(tl.int32), 0) == 4
    x = tl.load(token + i, mask=i < tokens)
    tl.store(sound_token + i, tl.where(sound, x, 0.0), mask=i < tokens)
    x = tl.load(channel + i, mask=i < channels)
    tl.store(sound_channel + i, tl.where(sound, x, 0.0), mask=i < channels)


@triton.jit
def _padding(count, block):
    """Empty places in whole blocks."""
    return (block - count % block) % block


@triton.jit(do_not_specialize=_SIZES + _COSTS)
def plan_rows_kernel(
    value_bits, key_bits, pinned, widths, values, layer_bits, channel_bits, value_odd, key_odd, out,
    T, D, C, token_block, key_block, pinned_cost, head_cost,
    CP: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """``out`` ``[5, R]`` int64: odd widths of values and keys, bits, whether it keeps all as it is, or anything."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    ci, di = tl.arange(0, CP), tl.arange(0, DP)
    width = tl.load(widths + ci, mask=ci < C + 2, other=255).to(tl.int32)
    count, odd, pins = tl.zeros([CP], tl.int32), tl.full([BT], _NO_WIDTH, tl.int32), tl.zeros([BT], tl.int32)
    for start in range(0, T, BT):
        ti = start + tl.arange(0, BT)
        bits = tl.load(value_bits + row * T + ti, mask=ti < T, other=0).to(tl.int32)
        pin = (tl.load(pinned + row * T + ti, mask=ti < T, other=0) != 0).to(tl.int32)
        named = tl.load(value_odd + bits, mask=ti < T, other=_NO_WIDTH).to(tl.int32)
        odd, pins = tl.minimum(odd, named), pins + pin
        bits = tl.where(pin > 0, 0, bits)
        count += tl.sum((bits[:, None] >= width[None, :]).to(tl.int32), 0)
    held = tl.sum(pins, 0)
    coded, wide = tl.sum(tl.where(ci == C, count, 0), 0), tl.sum(tl.where(ci == C + 1, count, 0), 0)
    bits = tl.load(key_bits + row * D + di, mask=di < D, other=0).to(tl.int32)
    key = tl.sum(tl.load(channel_bits + 2 * bits, mask=di < D, other=0), 0)
    overhead = tl.sum(tl.load(channel_bits + 2 * bits + 1, mask=di < D, other=0), 0)
    key += _padding(key, key_block)
    whole_keys = tl.sum(((bits == 16) & (di < D)).to(tl.int32), 0) == D
    raw = whole_keys & (wide == coded)  # nothing is quantised: no blocks, no channels
    free = tl.where(raw, 0, _padding(count, token_block)).to(tl.int64)
    blocks = tl.where(raw, 0, _padding(coded, token_block)).to(tl.int64)
    cost = tl.sum(count.to(tl.int64) * tl.load(values + ci, mask=ci < C, other=0), 0) + key * coded
    cost += tl.sum(free * tl.load(layer_bits + ci, mask=ci < C, other=0), 0) + blocks * key
    cost += tl.where(raw | (coded == 0), 0, overhead) + held.to(tl.int64) * pinned_cost + head_cost
    tl.store(out + row, tl.min(odd, 0).to(tl.int64))
    tl.store(out + rows + row, tl.min(tl.load(key_odd + bits, mask=di < D, other=_NO_WIDTH), 0))
    tl.store(out + 2 * rows + row, cost)
    tl.store(out + 3 * rows + row, (whole_keys & (wide + held == T)).to(tl.int64))
    tl.store(out + 4 * rows + row, (coded + held > 0).to(tl.int64))


@triton.jit(do_not_specialize=_SIZES + _COSTS)
def plan_figures_kernel(
    parts, figures, rows, heads, layers, full_cost, RP: tl.constexpr, EACH_HEAD: tl.constexpr
):  # fmt: skip
    """``figures`` ``[3 + layers]`` from ``parts`` ``[5, R]``; ``heads`` of a sequence, those of all layers."""
    ri = tl.arange(0, RP)
    inside = ri < rows
    tl.store(figures, tl.min(tl.load(parts + ri, mask=inside, other=_NO_WIDTH), 0).to(tl.float64))
    tl.store(figures + 1, tl.min(tl.load(parts + rows + ri, mask=inside, other=_NO_WIDTH), 0).to(tl.float64))
    cost = tl.load(parts + 2 * rows + ri, mask=inside, other=0)
    identity = tl.min(tl.load(parts + 3 * rows + ri, mask=inside, other=1), 0) > 0
    cost = tl.where(identity & inside, full_cost, cost)
    cost = tl.where(tl.max(tl.load(parts + 4 * rows + ri, mask=inside, other=0), 0) > 0, cost, 0)
    dearest = tl.max(cost, 0)
    if not EACH_HEAD:
        dearest = tl.zeros_like(dearest)
        for sequence in range(rows // heads):
            dearest = tl.maximum(dearest, tl.sum(tl.where(ri // heads == sequence, cost, 0), 0))
    tl.store(figures + 2, dearest.to(tl.float64))
    for layer in range(layers):
        bits = tl.sum(tl.where(ri % heads // (heads // layers) == layer, cost, 0), 0)
        tl.store(figures + 3 + layer, bits.to(tl.float64))


@triton.jit(do_not_specialize=_SIZES)
def sound_plan_kernel(
    value_bits, key_bits, pinned, figures, sound_value, sound_key, sound_pinned, tokens, channels, BLOCK: tl.constexpr
):
    """Copies of some of the plan, as bytes, or zeros."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sound = tl.minimum(tl.load(figures), tl.load(figures + 1)).to(tl.int32) == _NO_WIDTH
    for_tokens, for_channels = (i < tokens) & sound, (i < channels) & sound
    tl.store(sound_value + i, tl.load(value_bits + i, mask=for_tokens, other=0), mask=i < tokens)
    tl.store(sound_pinned + i, tl.load(pinned + i, mask=for_tokens, other=0), mask=i < tokens)
    tl.store(sound_key + i, tl.load(key_bits + i, mask=for_channels, other=0), mask=i < channels)
