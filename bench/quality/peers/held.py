"""What a peer's cache holds for the prompt, by the rule that ours is counted by: metadata too, against 16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.cache_utils import Cache, QuantizedLayer

from .masked import MaskedLayer
from .shape import HALF_BYTES, Shape

INDEX_BYTES = 3 * 8  # a sequence, a head and a position, by which kvpress remembers a masked key


def needed(cache: Cache, shape: Shape) -> int:
    """Bytes that a cache with the same contents takes: what is masked or zero is not there, and what is left is told.

    Args:
        shape: of the full cache.
    """
    layers: list[Any] = list(cache.layers)
    if any(isinstance(layer, MaskedLayer) and layer.evicted.any() for layer in layers):
        kept = sum(int((~layer.evicted).sum()) for layer in layers)
        return kept * shape.pair_bytes + shape.ragged_bytes
    nbytes = allocated(cache)
    zero = sum(zero_bytes(layer) for layer in layers if not isinstance(layer, QuantizedLayer))
    return nbytes - zero + shape.channel_map_bytes if zero else nbytes


def allocated(cache: Cache) -> int:
    """Bytes that are really allocated, what is masked or zero included."""
    return sum(_layer_bytes(layer) for layer in cache.layers)


def _layer_bytes(layer: Any) -> int:
    if isinstance(layer, QuantizedLayer):  # and what is not packed yet
        parts = (layer._quantized_keys, layer._quantized_values, layer.keys, layer.values)
        return sum(half_bytes(tensor) for part in parts for tensor in _tensors(part))
    nbytes: int = HALF_BYTES * (layer.keys.numel() + layer.values.numel())
    return nbytes + INDEX_BYTES * int(layer.evicted.sum()) if isinstance(layer, MaskedLayer) else nbytes


def zero_bytes(layer: Any) -> int:
    """Bytes of the key channels that are zero in every token."""
    zero = (layer.keys == 0).all(2).sum()  # of [B, H, D]
    return HALF_BYTES * int(zero) * int(layer.keys.shape[2])


def half_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's storage; a float32 number stands where a 16-bit model has 2 bytes, and counts as that."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(half_bytes(getattr(tensor, name)) for name in names)
    nbytes: int = tensor.untyped_storage().nbytes()
    return nbytes // 2 if tensor.dtype == torch.float32 else nbytes


def _tensors(part: Any) -> Iterator[Tensor]:
    """Tensors of a quantised tensor: quanto has a subclass of `Tensor`, HQQ codes and a dictionary."""
    if isinstance(part, Tensor):
        yield part
    else:
        codes, described = part
        yield codes
        yield from (value for value in described.values() if isinstance(value, Tensor))
