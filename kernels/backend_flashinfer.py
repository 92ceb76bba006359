"""FlashInfer for the 16-bit zones, our kernel for the packed one, joined by their log-sum-exp.

Heads are the batch: each of the ``R = B * H`` KV heads is a request of one KV head and ``G`` query heads
(tokens are ragged per head, which FlashInfer's page tables are per request), and every token is a page.
https://docs.flashinfer.ai/api/attention.html
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .backend_triton import TritonBackend
from .backends import Backend, say
from .packed import PINNED, PINNED_START, TOKENS, Packed
from .tail import Tail

HEAD_DIMS = (64, 128, 256)  # for which FlashInfer has kernels
WORKSPACE = 128 << 20  # bytes, as FlashInfer recommends
PLAN_BYTES, PLAN_BYTES_OF_ROW = 1 << 20, 64  # of a plan's tables


class FlashInferBackend(Backend):
    """Tail and pinned tokens by `BatchDecodeWithPagedKVCacheWrapper`; several queries, and no tail, by Triton."""

    name = "flashinfer"

    def __init__(self) -> None:
        self._flashinfer: Any = import_module("flashinfer")
        self._triton = TritonBackend()
        self._tails: dict[torch.device, Zone] = {}
        self._pinned: WeakKeyDictionary[Packed, Zone] = WeakKeyDictionary()

    def attend(self, query: Tensor, packed: Packed, scale: float, tail: Tail | None = None) -> tuple[Tensor, Tensor]:
        if tail is None or tail.length is None or query.shape[2] > 1 or packed.batch > len(query):
            return self._triton.attend(query, packed, scale, tail)
        if lacking := _lacking(packed, tail):
            say(f"attention backend 'flashinfer' {lacking}; 'triton' takes its place")
            return self._triton.attend(query, packed, scale, tail)
        rows, group = packed.batch * packed.heads, query.shape[1] // packed.heads
        dtype = tail.keys.dtype
        heads = query.to(dtype).reshape(rows, group, packed.dim).contiguous()
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            # The tail comes first: with the newest token in it no log-sum-exp is minus infinity on both sides,
            # which merge_state does not take.
            output, lse = self._attend_tail(heads, tail, scale)
            if any(row[PINNED] for row in packed.host_counts):
                output, lse = self._merge(output, lse, *self._attend_pinned(heads, packed, scale))
            if any(row[TOKENS] for row in packed.host_counts):
                plan = self._triton.plan(packed, packed.batch, 0, pinned=False)
                other = self._triton.attend_planned(query, packed, plan, scale, dtype=dtype)
                output, lse = self._merge(output, lse, other[0].view_as(output), other[1].view_as(lse))
        return output.reshape(query.shape).to(query.dtype), lse.reshape(query.shape[:3])

    def _merge(self, output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
        """States of two zones, ``[R, G, D]`` 16 bits and ``[R, G]`` float32 to base 2, as one."""
        merged: tuple[Tensor, Tensor] = self._flashinfer.merge_state(output, lse, other.to(output.dtype), other_lse)
        return merged

    def _attend_tail(self, heads: Tensor, tail: Tail, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of ``heads`` ``[R, G, D]`` over the tail; layers alike share a plan, made for every new length."""
        rows, capacity, length = heads.shape[0], tail.keys.shape[2], tail.length
        zone = self._tails.get(heads.device)
        if zone is None:
            zone = self._tails[heads.device] = Zone(self._flashinfer, rows, heads.device)
        key = (heads.shape, heads.dtype, scale, length, capacity)
        if zone.key != key:
            row = torch.arange(rows, dtype=torch.int32, device=heads.device)[:, None]
            pages = row * capacity + torch.arange(length or 0, dtype=torch.int32, device=heads.device)
            zone.plan(key, torch.full((rows,), length or 0), pages.flatten(), heads, scale)
        return zone.run(heads, tail.keys.flatten(0, 2), tail.values.flatten(0, 2))

    def _attend_pinned(self, heads: Tensor, packed: Packed, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of ``heads`` ``[R, G, D]`` over the pinned tokens, planned once for a prompt."""
        heads = heads.to(packed.pinned_keys.dtype)
        zone = self._pinned.get(packed)
        if zone is None:
            zone = self._pinned[packed] = Zone(self._flashinfer, heads.shape[0], heads.device)
        key = (heads.shape, heads.dtype, scale)
        if zone.key != key:
            counts = torch.tensor([row[PINNED] for row in packed.host_counts])
            zone.plan(key, counts, pinned_pages(packed, counts), heads, scale)
        return zone.run(heads, packed.pinned_keys, packed.pinned_values)

    def tensors(self) -> Iterator[Tensor]:
        yield from self._triton.tensors()
        for zone in (*self._tails.values(), *self._pinned.values()):
            yield from zone.tensors()


class Zone:
    """A planned run over tokens that are pages, one request for each row."""

    def __init__(self, flashinfer: Any, rows: int, device: torch.device) -> None:
        self.key: Any = None  # what it is planned for
        self._tables = torch.empty(PLAN_BYTES + PLAN_BYTES_OF_ROW * rows, dtype=torch.uint8, device=device)
        self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(device), "NHD", use_tensor_cores=True)
        # Its own tables take 8 MiB, which a wrapper for every layer's pinned tokens would take as often.
        self._wrapper.reset_workspace_buffer(workspace(device), self._tables)
        self._pages = torch.empty(0)
        self._planned: torch.cuda.Event | None = None

    def plan(self, key: Any, counts: Tensor, pages: Tensor, heads: Tensor, scale: float) -> None:
        """Plan for ``counts`` ``[R]`` tokens a row, on the host, and their ``pages`` ``[sum counts]`` on the device."""
        if self._planned is not None:
            self._planned.synchronize()  # the last plan's tables may still be on their way out of the same memory
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        self._wrapper.plan(
            starts.int(),
            pages,
            counts.clamp(max=1).int(),  # tokens of the last page
            heads.shape[1],
            1,
            heads.shape[2],
            1,
            q_data_type=heads.dtype,
            kv_data_type=heads.dtype,
            sm_scale=scale,
        )
        if heads.is_cuda:
            self._planned = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._planned.record()
        self.key, self._pages = key, pages

    def run(self, heads: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Output ``[R, G, D]`` in the type of ``heads`` and log-sum-exp to base 2 ``[R, G]``; tokens are ``[N, D]``."""
        pages = (keys[:, None, None], values[:, None, None])  # [N, 1, 1, D]
        done: tuple[Tensor, Tensor] = self._wrapper.run(heads, pages, return_lse=True)
        return done

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held; the workspace is the process's."""
        yield from (self._tables, self._pages)


@cache
def workspace(device: torch.device) -> Tensor:
    """Scratch memory of every run on a device, which are one after the other; FlashInfer wants zeros at first."""
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


def pinned_pages(packed: Packed, counts: Tensor) -> Tensor:
    """Places of all rows' pinned tokens, row by row, ``[sum counts]`` int32; ``counts`` ``[R]`` is on the host."""
    row = torch.arange(len(counts)).repeat_interleave(counts)
    place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    device = packed.starts.device
    return (packed.starts[:, PINNED_START][row.to(device)] + place.to(device)).int()


def _lacking(packed: Packed, tail: Tail) -> str | None:
    """What FlashInfer lacks for these, if anything."""
    if packed.dim not in HEAD_DIMS:
        return f"has no kernel for heads of {packed.dim} channels (only {', '.join(map(str, HEAD_DIMS))})"
    for dtype in (tail.keys.dtype, packed.pinned_keys.dtype):
        if dtype.itemsize != 2:
            return f"takes 16-bit tokens, not {dtype}"
    return None
