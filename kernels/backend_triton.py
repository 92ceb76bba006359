"""Attention by our Triton kernels: every zone of every sequence in one launch, then one that merges."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import decode
from .backends import Backend, TorchBackend
from .decode_plan import DecodePlan
from .packed import Packed
from .tail import Tail

MOST_QUERIES = 64  # query rows of a KV head at once; for more, unpacking once is the smaller work
MOST_CHANNELS = 256


class TritonBackend(Backend):
    """`decode.attend` with plans that are kept; what it does not take goes to plain PyTorch."""

    name = "triton"

    def __init__(self) -> None:
        # By sequences, whether there is a tail, and whether pinned tokens are in it.
        self._plans: WeakKeyDictionary[Packed, dict[tuple[int, bool, bool], DecodePlan]] = WeakKeyDictionary()
        self._torch = TorchBackend()

    def attend(self, query: Tensor, packed: Packed, scale: float, tail: Tail | None = None) -> tuple[Tensor, Tensor]:
        queries = query.shape[1] // packed.heads * query.shape[2]
        if not _fits(packed, tail) or queries > MOST_QUERIES or (tail is not None and query.shape[2] > 1):
            return self._torch.attend(query, packed, scale, tail)
        if tail is None:
            return self.attend_planned(query, packed, self.plan(packed, len(query), 0), scale)
        plan = self.plan(packed, len(query), tail.keys.shape[2])
        return self.attend_planned(query, packed, plan, scale, tail, query.dtype)

    def attend_planned(
        self,
        query: Tensor,
        packed: Packed,
        plan: DecodePlan,
        scale: float,
        tail: Tail | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """`decode.attend` on the device of ``query``, which need not be the current one."""
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            return decode.attend(query, packed, plan, scale, tail, dtype)

    def plan(self, packed: Packed, sequences: int, capacity: int, pinned: bool = True) -> DecodePlan:
        """The plan of a prompt and a tail of ``capacity`` tokens (0 for none), made when it is first asked for."""
        plans = self._plans.setdefault(packed, {})
        key = (sequences, capacity > 0, pinned)
        found = plans.get(key)
        if found is None or found.tail_capacity != capacity:  # the tail moved to a larger buffer
            found = plans[key] = decode.plan(packed, capacity, pinned=pinned, sequences=sequences)
        return found

    def tensors(self) -> Iterator[Tensor]:
        for plans in self._plans.values():
            for plan in plans.values():
                yield from (plan.items, plan.first_item)


def _fits(packed: Packed, tail: Tail | None) -> bool:
    """Whether the kernels take these types and sizes (a float32 cache stays one at a budget of 1)."""
    kept = [packed.pinned_keys.dtype, *([] if tail is None else [tail.keys.dtype])]
    return packed.dim <= MOST_CHANNELS and all(dtype.itemsize == 2 for dtype in kept)
