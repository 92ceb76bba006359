"""The 16-bit tokens after a prompt: as kernels read them, and the buffers in which they grow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import naive

CAPACITY = 256  # tokens of the first buffer; each later one holds twice as many


@dataclass(frozen=True)
class Tail:
    """The 16-bit tokens after a prompt, in buffers that a captured graph may grow into.

    Attributes:
        keys, values: ``[B, H, capacity, D]`` float16 or bfloat16, the last dimension contiguous.
        lengths: ``[B]`` int32, on the same device: tokens of each sequence.
        length: the same on the host, where it is one for all sequences and known there.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    length: int | None = None


@dataclass(frozen=True)
class PagedTail:
    """The 16-bit tokens after prompts of a `kernels.arena.Arena`, scattered over a pool.

    Attributes:
        keys, values: ``[N, H, D]`` float16 or bfloat16, the last dimension contiguous.
        pages: int32, which of the ``N`` every token is.
        starts: ``[B]`` int64, where in ``pages`` each sequence's tail starts.
        lengths: ``[B]`` int32, tokens of each sequence.
        places: ``[B]``, where in the arena each sequence's prompt is.
    """

    keys: Tensor
    values: Tensor
    pages: Tensor
    starts: Tensor
    lengths: Tensor
    places: Tensor


def attention(query: Tensor, tail: Tail, scale: float) -> tuple[Tensor, Tensor]:
    """`naive.attention` of ``query`` ``[B, H_q, Q, D]`` over a tail, all of which every query sees."""
    if tail.length is not None:
        held = slice(tail.length)
        return naive.attention(query, tail.keys[:, :, held], tail.values[:, :, held], scale)
    slots = torch.arange(tail.keys.shape[2], device=query.device)
    visible = slots < tail.lengths[:, None, None, None]  # [B, 1, 1, capacity]
    return naive.attention(query, tail.keys, tail.values, scale, visible)


def with_tail(output: Tensor, lse: Tensor, query: Tensor, scale: float, tail: Tail | None) -> tuple[Tensor, Tensor]:
    """Attention of ``query`` over a prompt, ``output`` and ``lse``, joined with that over the tail after it."""
    if tail is None:
        return output, lse
    return naive.merge_states(*attention(query, tail, scale), output, lse)


class TailBuffer:
    """Tokens of one layer in the order in which they come, all sequences alike; a full buffer is exchanged.

    Attributes:
        length: tokens held.
        first: tokens that were there from the start.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Start with ``keys`` and ``values`` ``[B, H, n, D]``, which are never written to; ``n`` may be 0."""
        self._keys, self._values = keys, values
        self._lengths: Tensor | None = None  # until a kernel asks
        self.length = self.first = keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take new tokens ``[B, H, n, D]``, in the buffer's type; the device is not waited for."""
        end = self.length + keys.shape[2]
        if end > self._keys.shape[2]:
            capacity = self._capacity(end)
            self._keys, self._values = (self._moved(t, capacity) for t in (self._keys, self._values))
        with torch.no_grad():  # or the buffer would join the caller's graph
            self._keys[:, :, self.length : end] = keys
            self._values[:, :, self.length : end] = values
            if self._lengths is not None:
                self._lengths += keys.shape[2]
        self.length = end

    def _capacity(self, tokens: int) -> int:
        """What was there from the start, and room for the others that is doubled until they fit."""
        room = CAPACITY
        while self.first + room < tokens:
            room *= 2
        return self.first + room

    def _moved(self, old: Tensor, capacity: int) -> Tensor:
        batch, heads, _, dim = old.shape
        with torch.inference_mode(False), torch.no_grad():  # or it could be changed in inference mode alone
            new = torch.zeros(batch, heads, capacity, dim, dtype=old.dtype, device=old.device)
            new[:, :, : self.length] = old[:, :, : self.length]
        return new

    @property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """Keys and values held, ``[B, H, length, D]``; views of the buffers."""
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    @property
    def tail(self) -> Tail:
        """The whole buffers, as kernels read them."""
        if self._lengths is None:
            with torch.inference_mode(False):
                self._lengths = torch.full(
                    (self._keys.shape[0],), self.length, dtype=torch.int32, device=self._keys.device
                )
        return Tail(self._keys, self._values, self._lengths, self.length)

    def fork(self) -> TailBuffer:
        """A tail with what was there from the start, which is shared: the first token that it takes exchanges it."""
        keys, values = (t[:, :, : self.first] for t in (self._keys, self._values))
        # A view of nothing would keep this tail's buffers alive.
        return TailBuffer(keys, values) if self.first else TailBuffer(keys.clone(), values.clone())

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held."""
        yield from (self._keys, self._values)
        if self._lengths is not None:
            yield self._lengths
