"""The small operations between the matrix products of a decode step, one launch each; `naive_step` says what they are.

None of them waits for the device, and all may be captured in a graph.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .device import launches_early
from .naive_step import HeadNorms
from .step_kernels import add_norm_kernel, append_kernel, gated_kernel

BLOCK = 1024  # elements of a program of `gated`


def add_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """As `naive_step.add_norm`; ``residual`` and ``delta`` are contiguous."""
    rows, width = residual.shape
    out = torch.empty_like(residual)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(residual):  # type: ignore[no-untyped-call]
        add_norm_kernel[(rows,)](
            residual, residual if delta is None else delta, weight, out, eps,
            N=width, BN=block, ADD=delta is not None, num_warps=min(16, max(1, block // 512)), **_early(residual),
        )  # fmt: skip
    return out


def append(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    norms: HeadNorms | None,
    lengths: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """As `naive_step.append`; all but the tails are contiguous."""
    batch, heads, _, dim = keys.shape
    q_heads = qkv.shape[1] // dim - 2 * heads
    query = torch.empty(batch, q_heads, 1, dim, dtype=qkv.dtype, device=qkv.device)
    with torch.cuda.device_of(qkv):  # type: ignore[no-untyped-call]
        append_kernel[(batch, q_heads + 2 * heads)](
            qkv, qkv if cos is None else cos, qkv if sin is None else sin,
            qkv if norms is None else norms.query, qkv if norms is None else norms.key,
            lengths, query, keys, values, 0.0 if norms is None else norms.eps,
            qkv.stride(0), *keys.stride()[:3], *values.stride()[:3],
            HQ=q_heads, H=heads, D=dim, DP=triton.next_power_of_2(dim), R=0 if cos is None else cos.shape[1],
            NORM=norms is not None, num_warps=1, **_early(qkv),
        )  # fmt: skip
    return query


def gated(gate_up: Tensor) -> Tensor:
    """As `naive_step.gated`; ``gate_up`` is contiguous."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    with torch.cuda.device_of(gate_up):  # type: ignore[no-untyped-call]
        gated_kernel[(rows, triton.cdiv(width, BLOCK))](gate_up, out, width, BN=BLOCK, num_warps=4, **_early(gate_up))
    return out


def _early(tensor: Tensor) -> dict[str, bool]:
    """Options of a launch that may start before the one ahead of it has ended, where the device has such."""
    return {"PDL": True, "launch_pdl": True} if launches_early(tensor.device) else {"PDL": False}
