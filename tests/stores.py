"""Arenas with random prompts in them, for tests of what reads them."""

from __future__ import annotations

import torch
from packs import DEVICE

from rdkv.kernels.arena import Arena
from rdkv.kernels.arena_shape import EVEN, ArenaShape
from rdkv.kernels.naive_rotation import span
from rdkv.kernels.packed import Packed

LAYERS, HEADS, PLACES = 2, 2, 6
EVENLY = (EVEN,) * LAYERS


def make_arena(dim: int, dtype: torch.dtype = torch.bfloat16, shares: tuple[int, ...] = EVENLY) -> Arena:
    """An arena of ``LAYERS`` layers, with NaN wherever nothing was written."""
    empty = ArenaShape(shares, HEADS, dim, span(dim), dtype, PLACES, 0)
    arena = Arena(ArenaShape(shares, HEADS, dim, span(dim), dtype, PLACES, empty.unit * 2000), torch.device(DEVICE))
    arena._store.fill_(0xFF)
    return arena


def packed_bytes(packed: Packed) -> int:
    """Bytes of what goes into a region."""
    flat = (packed.key_codes, packed.key_columns, packed.value_codes, packed.value_affine)
    return sum(t.nbytes for t in (*flat, packed.pinned_keys, packed.pinned_values))


def filled(prompts: dict[int, Packed], dim: int, shares: tuple[int, ...] = EVENLY) -> Arena:
    """An arena with prompts, by place, the same in every layer; regions lie in the order of ``prompts``."""
    arena, start = make_arena(dim, shares=shares), 0
    for place, packed in prompts.items():
        need = arena.shape.layer_bytes(packed_bytes(packed))
        size = arena.shape.region_bytes([need] * LAYERS)
        for layer in range(LAYERS):
            used = arena.write(layer, place, slice(start, start + size), packed)
            assert packed_bytes(packed) <= used <= need
        arena.prompt_tokens[place] = 90
        start += size
    return arena
