"""Bytes of storages, and the 16-bit type that holds a float32 cache."""

from __future__ import annotations

import pytest
import torch

from rdkv.runtime.storage import half_dtype, storage_bytes


def test_a_shared_storage_counts_once() -> None:
    whole = torch.zeros(10, 4)
    assert storage_bytes([whole, whole[2:], torch.zeros(3, dtype=torch.uint8)]) == 160 + 3


def test_a_view_counts_what_it_keeps_alive() -> None:
    assert storage_bytes([torch.zeros(100, dtype=torch.float16)[:1]]) == 200


def test_nothing_takes_no_bytes() -> None:
    assert storage_bytes([]) == storage_bytes([torch.zeros(0), torch.zeros(0, 5)]) == 0


@pytest.mark.parametrize(("largest", "dtype"), [(65000.0, torch.float16), (-70000.0, torch.bfloat16)])
@pytest.mark.parametrize("in_keys", [True, False])
def test_float16_where_it_reaches(largest: float, dtype: torch.dtype, in_keys: bool) -> None:
    tensors = torch.ones(2, 3), torch.ones(2, 3)
    tensors[0 if in_keys else 1][1, 2] = largest
    assert half_dtype(*tensors) == dtype
