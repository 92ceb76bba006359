"""What tensors take in memory, and the type that a cache's unquantised parts are stored in."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each counted once however many tensors share it."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def half_dtype(keys: Tensor, values: Tensor) -> torch.dtype:
    """The 16-bit type for float32 ``keys`` and ``values``: float16, or bfloat16 where they exceed its range."""
    largest = max(float(keys.abs().amax()), float(values.abs().amax()))
    return torch.float16 if largest < torch.finfo(torch.float16).max else torch.bfloat16
