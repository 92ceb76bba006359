"""Kernels of `step`: what a decode step does between its matrix products, one pass each.

    add_norm   x = x + d,   y = w * x / sqrt(mean(x^2) + eps)
    append     q, k = rotate(norm(q)), rotate(norm(k));   the tail's last slot = k, v
    gated      y = gate / (1 + exp(-gate)) * up

Sums are float32; every product that transformers' modules round to the model's type is rounded here too. With `PDL` a
launch may start before the one ahead has ended (programmatic dependent launch), and waits for it itself.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _wait(PDL: tl.constexpr):
    """Let the next launch start, and wait for the one ahead."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _norm(x, weight, eps, N: tl.constexpr):
    """RMS norm of ``x``, 0 beyond its ``N`` elements, in the type of ``weight``."""
    wide = x.to(tl.float32)
    scaled = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / N + eps)).to(weight.dtype)
    return (weight.to(tl.float32) * scaled.to(tl.float32)).to(weight.dtype)


@triton.jit
def add_norm_kernel(
    residual, delta, weight, out, eps, N: tl.constexpr, BN: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr
):
    """A row of ``[rows, N]``: add ``delta`` to ``residual`` in place, and its norm into ``out``."""
    n = tl.arange(0, BN)
    at = tl.program_id(0).to(tl.int64) * N + n
    w = tl.load(weight + n, mask=n < N, other=0.0)
    _wait(PDL)
    x = tl.load(residual + at, mask=n < N, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(delta + at, mask=n < N, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(residual + at, x, mask=n < N)
    tl.store(out + at, _norm(x, w, eps, N), mask=n < N)


@triton.jit
def append_kernel(
    qkv, cos, sin, query_weight, key_weight, lengths, query, keys, values, eps,
    q_stride, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t,
    HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One head of one sequence's newest token: a query into ``query [B, HQ, D]``, a key or value into its tail."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, DP)
    source = qkv + row * q_stride + head * D
    _wait(PDL)
    x = tl.load(source + d, mask=d < D, other=0.0)
    if head < HQ + H:
        other = tl.where(d < R // 2, d + R // 2, d - R // 2)  # the channel that a rotation mixes with
        y = tl.load(source + other, mask=d < R, other=0.0)
        if NORM:
            weight = query_weight if head < HQ else key_weight
            wide = x.to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
            w = tl.load(weight + d, mask=d < D, other=0.0)
            v = tl.load(weight + other, mask=d < R, other=0.0)
            x = (w.to(tl.float32) * (wide * scale).to(w.dtype).to(tl.float32)).to(w.dtype)
            y = (v.to(tl.float32) * (y.to(tl.float32) * scale).to(v.dtype).to(tl.float32)).to(v.dtype)
        if R > 0:
            c = tl.load(cos + row * R + d, mask=d < R, other=1.0).to(tl.float32)
            s = tl.load(sin + row * R + d, mask=d < R, other=0.0).to(tl.float32)
            y = tl.where(d < R // 2, -y.to(tl.float32), y.to(tl.float32))
            turned = (x.to(tl.float32) * c).to(x.dtype).to(tl.float32) + (y * s).to(x.dtype).to(tl.float32)
            x = tl.where(d < R, turned.to(x.dtype), x)
    last = tl.load(lengths + row).to(tl.int64) - 1
    if head < HQ:
        tl.store(query + (row * HQ + head) * D + d, x, mask=d < D)
    elif head < HQ + H:
        key = keys + row * k_stride_b + (head - HQ) * k_stride_h + last * k_stride_t
        tl.store(key + d, x.to(keys.dtype.element_ty), mask=d < D)
    else:
        value = values + row * v_stride_b + (head - HQ - H) * v_stride_h + last * v_stride_t
        tl.store(value + d, x.to(values.dtype.element_ty), mask=d < D)


@triton.jit
def gated_kernel(gate_up, out, N, BN: tl.constexpr, PDL: tl.constexpr):
    """A block of a row: ``silu(gate) * up`` of ``gate_up [rows, 2 N]`` into ``out [rows, N]``."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    _wait(PDL)
    gate = tl.load(gate_up + row * 2 * N + n, mask=n < N, other=0.0)
    up = tl.load(gate_up + row * 2 * N + N + n, mask=n < N, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out + row * N + n, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=n < N)
