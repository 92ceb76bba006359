"""Decode attention over a full 16-bit cache by other libraries: FlashInfer's paged decode and PyTorch's sdpa."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from . import timing
from .cases import Shape

PAGE = 16  # tokens of a page
WORKSPACE = 256 << 20  # bytes
Step = Callable[[Tensor, Tensor], Tensor]  # of keys and values
Prepare = Callable[[Shape, Tensor], Step]  # for a shape and a query


def full_cache(shape: Shape, device: str = "cuda") -> dict[str, Any]:
    """Microseconds of a step of each library, and for None the reason; the memory is given back."""
    record: dict[str, Any] = {"full_bytes": shape.full_bytes}
    for name, prepare in LIBRARIES.items():
        try:
            record |= {f"{name}_us": round(_microseconds(prepare, shape, device), 2), f"{name}_reason": None}
        except Exception as error:  # not installed, no compiler, no memory, no kernel for the shape
            record |= {f"{name}_us": None, f"{name}_reason": short(error)}
        torch.cuda.empty_cache()
    return record


def _microseconds(prepare: Prepare, shape: Shape, device: str) -> float:
    query = torch.randn(shape.batch, shape.heads * shape.group, 1, shape.dim, device=device).bfloat16()
    step = prepare(shape, query)
    layers = [_buffers(shape, device) for _ in range(timing.copies(shape.full_bytes))]
    return timing.microseconds(lambda layer: step(*layer), layers)


def _buffers(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Flat keys and values of a layer, whole pages; each library sees them in its own order."""
    count = shape.batch * shape.heads * math.ceil(shape.tokens / PAGE) * PAGE * shape.dim
    keys, values = (torch.empty(count, device=device, dtype=torch.bfloat16).normal_() for _ in range(2))
    return keys, values


def flashinfer_step(shape: Shape, query: Tensor) -> Step:
    """FlashInfer's paged decode with tensor cores; planned here, so that only its run is timed."""
    import flashinfer

    pages = math.ceil(shape.tokens / PAGE)
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(shape.batch + 1, dtype=torch.int32) * pages,
        torch.arange(shape.batch * pages, dtype=torch.int32, device="cuda"),
        torch.full((shape.batch,), (shape.tokens - 1) % PAGE + 1, dtype=torch.int32),
        shape.heads * shape.group,
        shape.heads,
        shape.dim,
        PAGE,
        pos_encoding_mode="NONE",
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    flat, view = query.squeeze(2), (shape.batch * pages, PAGE, shape.heads, shape.dim)
    return lambda keys, values: wrapper.run(flat, (keys.view(view), values.view(view)))


def sdpa_step(shape: Shape, query: Tensor) -> Step:
    """PyTorch's flash attention with grouped queries."""
    size = shape.batch * shape.heads * shape.tokens * shape.dim
    view = (shape.batch, shape.heads, shape.tokens, shape.dim)

    def step(keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            keys, values = keys[:size].view(view), values[:size].view(view)
            return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return step


LIBRARIES: dict[str, Prepare] = {"flashinfer": flashinfer_step, "sdpa": sdpa_step}


def short(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
