"""Decode attention of an SGLang batch: packed prompts in the arena, the tokens after them in SGLang's pool."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels import naive, naive_decode
from ...kernels.arena import Arena
from ...kernels.packed import HostCounts


class Decode(Protocol):
    """Attention of a batch that decodes, in steps of which each is prepared before its layers attend."""

    def reserve(self, batch: int) -> None:
        """Give a batch size, which a graph is about to be captured for, memory of its own."""

    def prepare(self, places: Tensor, lengths: Tensor) -> None:
        """Note a step's batch: ``places`` ``[B]`` are rows of SGLang's tables, ``lengths`` ``[B]`` all tokens."""

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attention of the newest tokens' ``query`` ``[B, H_q, 1, D]``, in its type."""


class PlainDecode(Decode):
    """Sequence by sequence in plain PyTorch, where there is no GPU."""

    def __init__(self, arena: Arena, host_counts: dict[int, list[HostCounts]], runner: Any) -> None:
        self._arena, self._host_counts = arena, host_counts
        self._pool, self._requests = runner.token_to_kv_pool, runner.req_to_token_pool
        self._batch: list[tuple[int, Tensor]] = []  # place, and slots of the tokens after the packed prompt

    def reserve(self, batch: int) -> None:
        """Nothing: there are no graphs."""

    def prepare(self, places: Tensor, lengths: Tensor) -> None:
        rows, starts = self._requests.req_to_token, self._arena.prompt_tokens[places]
        bounds = zip(places.tolist(), starts.tolist(), lengths.tolist(), strict=True)
        self._batch = [(place, rows[place, start:end].long()) for place, start, end in bounds]

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        pools = self._pool.get_key_buffer(layer), self._pool.get_value_buffer(layer)
        outputs = []
        for i, (place, slots) in enumerate(self._batch):
            row = query[i : i + 1]
            keys, values = (pool[slots].transpose(0, 1).unsqueeze(0) for pool in pools)  # [1, H, n, D]
            output, lse = naive.attention(row, keys, values, scale)
            if place in self._host_counts:
                packed = self._arena.view(layer, [place], self._host_counts[place][layer])
                output, lse = naive.merge_states(output, lse, *naive_decode.attend(row, packed, scale))
            outputs.append(output)
        return torch.cat(outputs).to(query.dtype)


class KernelDecode(Decode):
    """The whole batch in two launches a layer, whose work is cut on the device: all of a step can be captured."""

    def __init__(self, arena: Arena, runner: Any) -> None:
        from ...kernels import decode, decode_schedule  # not above: they need Triton

        self._attend, self._make = decode.attend, decode_schedule.Schedule
        self._arena, self._pool, self._pages = arena, runner.token_to_kv_pool, runner.req_to_token_pool.req_to_token
        self._reserved: dict[int, Any] = {}  # schedules of captured graphs, by batch size
        self._step: tuple[Any, Tensor] | None = None

    def reserve(self, batch: int) -> None:
        if batch not in self._reserved:
            self._reserved[batch] = self._make(self._arena, batch)

    def prepare(self, places: Tensor, lengths: Tensor) -> None:
        batch = len(places)
        schedule = self._reserved[batch] if batch in self._reserved else self._make(self._arena, batch)
        schedule.update(places, lengths, self._pages.stride(0))
        self._step = schedule, places

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        assert self._step is not None
        schedule, places = self._step
        pools = self._pool.get_key_buffer(layer), self._pool.get_value_buffer(layer)
        tail = schedule.tail(*pools, self._pages, places)
        packed, plan = self._arena.layers[layer], schedule.plans[layer]
        return self._attend(query, packed, plan, scale, tail, query.dtype)[0]
