"""Decode attention over a packed prompt and a 16-bit tail, in two launches: every zone's items, then their merge."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import naive
from .decode_kernels import attend_kernel, merge_kernel
from .decode_plan import DecodePlan, Tile, choose_tile, make_plan
from .device import launches_early
from .naive_rotation import exponents
from .packed import Packed
from .tail import PagedTail
from .tail import Tail as Tail

QUERIES = 8  # rows of queries (group times new tokens) of one program


def plan(
    packed: Packed,
    tail_capacity: int = 0,
    tile: Tile | None = None,
    pinned: bool = True,
    sequences: int | None = None,
) -> DecodePlan:
    """Work items for a prompt, for `attend`; made once after packing, and again when a tail's buffer is exchanged.

    Args:
        packed: the prompt.
        tail_capacity: tokens that the tail's buffer holds, 0 for no tail.
        tile: shape of a tile, if not the one that suits the prompt.
        pinned: whether to attend to the pinned tokens too.
        sequences: of the queries, if fewer than of the prompt, see `attend`.
    """
    return make_plan(packed, tail_capacity, tile or choose_tile(packed), pinned, sequences)


def attend(
    query: Tensor,
    packed: Packed,
    plan: DecodePlan,
    scale: float,
    tail: Tail | PagedTail | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of ``query`` over the packed prompt and the tail; never waits for the device.

    Args:
        query: ``[B, H_q, Q, D]``; query head ``h * G + g`` reads KV head ``h``. Every query sees all of the prompt
            and of the tail, so with a tail ``Q`` is 1.
        packed: the prompt, ``B * H`` rows, or ``n B * H`` where sequences ``i``, ``B + i``, ``2 B + i`` and so on are
            parts of the same one; with a paged tail, a layer of an arena.
        plan: its `plan`, of at least the tail's capacity; with a paged tail, that of a `decode_schedule.Schedule`.
        scale: factor of the logits.
        tail: tokens after the prompt.
        dtype: type of the output, float32 by default.

    Returns:
        Output ``[B, H_q, Q, D]`` and log-sum-exp to base 2 ``[B, H_q, Q]`` float32, minus infinity (and output 0)
        where there is no token.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(query, packed, plan, tail)
    query = query if query.stride(-1) == 1 else query.contiguous()
    out = torch.empty(query.shape, dtype=dtype or torch.float32, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    _launch(query, packed, plan, scale, tail, out, lse)
    return out, lse


def _check(query: Tensor, packed: Packed, plan: DecodePlan, tail: Tail | PagedTail | None) -> None:
    batch, q_heads, length, dim = query.shape
    expected = (len(plan.first_item) - 1) // packed.heads
    if batch != expected or dim != packed.dim or q_heads % packed.heads:
        raise ValueError(
            f"query [B, H_q, Q, D] = {list(query.shape)} does not fit the plan's {expected} sequences of "
            f"{packed.heads} KV heads of {packed.dim} channels"
        )
    if tail is None:
        return
    if length != 1:
        raise ValueError(f"{length} queries at once would not all see the same tail; attend to it apart")
    if isinstance(tail, Tail) and tail.keys.shape[2] > plan.tail_capacity:
        raise ValueError(f"the plan covers a tail of {plan.tail_capacity} tokens, not {tail.keys.shape[2]}")


def _launch(
    query: Tensor,
    packed: Packed,
    plan: DecodePlan,
    scale: float,
    tail: Tail | PagedTail | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    batch, q_heads, length, dim = query.shape
    group, tile = q_heads // packed.heads, plan.tile
    rows, items = batch * packed.heads, plan.items.shape[0]
    padded = max(16, triton.next_power_of_2(dim))
    parts = torch.empty(items, group * length, dim, dtype=torch.float32, device=query.device)
    part_lses = torch.empty(items, group * length, dtype=torch.float32, device=query.device)
    early = launches_early(query.device)
    options = {"launch_pdl": True} if early else {}
    if items:
        attend_kernel[(items * -(-group * length // QUERIES),)](
            query, *query.stride()[:3],
            packed.key_codes, packed.key_columns, packed.key_affine.view(torch.int32),
            packed.value_codes, packed.value_affine.view(torch.int32),
            packed.pinned_keys, packed.pinned_values, packed.pinned_keys.stride(0), packed.counts, packed.starts,
            *_tail_arguments(packed, tail), plan.items, parts, part_lses, scale * naive.LOG2_E, batch,
            H=packed.heads, G=group, Q=length, N=QUERIES, D=dim, DP=padded,
            W=tile.octets, NA=tile.nibbles, NB=tile.more_nibbles, NS=tile.pairs, MANY=tile.many,
            AHEAD=tile.ahead, BT=16 * tile.warps, PAGED=isinstance(tail, PagedTail), PDL=early,
            num_warps=tile.warps, num_stages=1, maxnreg=tile.registers, **options,
        )  # fmt: skip
    together = min(64, max(4, triton.next_power_of_2(plan.most_items)))
    merge_kernel[(rows, group * length)](
        parts, part_lses, plan.items, plan.first_item, out, lse, *out.stride()[:3], *lse.stride()[:3],
        H=packed.heads, G=group, Q=length, D=dim, DP=padded, BI=together, PDL=early,
        SPAN=packed.span, FACTOR=2.0 ** -exponents(packed.span)[1], num_warps=4, **options,
    )  # fmt: skip


def _tail_arguments(packed: Packed, tail: Tail | PagedTail | None) -> tuple[Any, ...]:
    """Keys, values, strides by sequence, head and token, lengths, places, pages, their starts; for none, anything."""
    none = packed.counts
    if isinstance(tail, PagedTail):
        strides = (0, tail.keys.stride(1), tail.keys.stride(0))
        return tail.keys, tail.values, *strides, tail.lengths, tail.places, tail.pages, tail.starts
    if tail is None:
        return packed.pinned_keys, packed.pinned_values, 0, 0, 0, none, none, none, none
    return tail.keys, tail.values, *tail.keys.stride()[:3], tail.lengths, none, none, none
