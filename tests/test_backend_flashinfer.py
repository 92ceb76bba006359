"""The FlashInfer backend: its control flow against a stand-in, its numbers where FlashInfer and a GPU are."""

from __future__ import annotations

import gc
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packs import random_packed, random_query, random_tail
from test_backends import assert_agrees
from torch import Tensor

from rdkv.kernels import naive
from rdkv.kernels.backends import ChosenBackend, TorchBackend
from rdkv.kernels.tail import Tail

pytest.importorskip("triton")
from rdkv.kernels import backend_flashinfer
from rdkv.kernels.backend_flashinfer import FlashInferBackend

LN2 = 0.6931471805599453
pytestmark = pytest.mark.usefixtures("fresh_backends")


class Wrapper:
    """`BatchDecodeWithPagedKVCacheWrapper` in a few lines of PyTorch."""

    plans = 0

    def __init__(self, workspace: Tensor, layout: str, use_tensor_cores: bool) -> None:
        assert layout == "NHD"
        assert use_tensor_cores
        assert not workspace.any()

    def reset_workspace_buffer(self, workspace: Tensor, tables: Tensor) -> None:
        assert tables.dtype == torch.uint8

    def plan(
        self, starts: Tensor, pages: Tensor, last: Tensor, q_heads: int, kv_heads: int, dim: int, size: int, **more: Any
    ) -> None:
        assert (kv_heads, size) == (1, 1)
        assert {t.dtype for t in (starts, pages, last)} == {torch.int32}
        assert starts.device.type == last.device.type == "cpu"  # or planning would wait for the device
        assert int(starts[-1]) == len(pages)
        assert last.tolist() == starts.diff().clamp(max=1).tolist()
        self.starts, self.pages, self.shape, self.more = starts.tolist(), pages, (len(last), q_heads, dim), more
        Wrapper.plans += 1

    def run(self, query: Tensor, cache: tuple[Tensor, Tensor], return_lse: bool) -> tuple[Tensor, Tensor]:
        assert return_lse
        assert tuple(query.shape) == self.shape
        assert query.dtype == cache[0].dtype == self.more["q_data_type"] == self.more["kv_data_type"]
        outputs, lses = [], []
        for row in range(len(query)):
            pages = self.pages[self.starts[row] : self.starts[row + 1]].long()
            keys, values = (part[pages, 0, 0][None, None] for part in cache)
            output, lse = naive.attention(query[row][None, :, None], keys, values, self.more["sm_scale"])
            outputs.append(output[0, :, 0])
            lses.append(lse[0, :, 0])
        return torch.stack(outputs).to(query.dtype), torch.stack(lses)


def merge_state(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    assert all(t.is_contiguous() for t in (a, b, lse_a, lse_b))
    assert a.dtype == b.dtype != torch.float32 == lse_a.dtype == lse_b.dtype
    assert a.dim() == b.dim() == 3
    lse = torch.logaddexp(lse_a * LN2, lse_b * LN2) / LN2
    assert lse.isfinite().all()  # FlashInfer divides by zero where neither has a token
    output = a * (lse_a - lse).exp2().unsqueeze(-1) + b * (lse_b - lse).exp2().unsqueeze(-1)
    return output.to(a.dtype), lse


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Wrapper]]:
    module = type("flashinfer", (), {"BatchDecodeWithPagedKVCacheWrapper": Wrapper, "merge_state": merge_state})
    monkeypatch.setattr(backend_flashinfer, "import_module", lambda _: module)
    monkeypatch.setattr(backend_flashinfer, "WORKSPACE", 16)
    monkeypatch.setattr(Wrapper, "plans", 0)
    backend_flashinfer.workspace.cache_clear()
    yield Wrapper
    backend_flashinfer.workspace.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zones_are_joined(stand_in: type[Wrapper], dtype: torch.dtype) -> None:
    backend, packed = FlashInferBackend(), random_packed(tokens=40, dtype=torch.bfloat16)
    query, tail = random_query(packed, dtype=torch.float32), random_tail(packed, dtype=dtype)
    assert_agrees(backend, query, packed, tail)
    assert backend.attend(query, packed, 0.1, tail)[0].dtype == query.dtype
    assert stand_in.plans == 2  # once for the tail, once for the pinned tokens
    longer = Tail(tail.keys.nan_to_num(), tail.values.nan_to_num(), tail.lengths + 1, 6)
    assert_agrees(backend, query, packed, longer)
    assert stand_in.plans == 3
    held = sum(t.nbytes for t in backend.tensors())
    del packed, query
    gc.collect()
    assert sum(t.nbytes for t in backend.tensors()) < held


def test_layers_share_the_plan_of_the_tail(stand_in: type[Wrapper]) -> None:
    backend = FlashInferBackend()
    for _ in range(3):
        packed = random_packed(batch=1, tokens=20)
        assert_agrees(backend, random_query(packed), packed, random_tail(packed))
    assert stand_in.plans == 1 + 3


def test_nothing_but_the_tail(stand_in: type[Wrapper]) -> None:
    backend, packed = FlashInferBackend(), random_packed(batch=1, heads=1)  # its one head keeps nothing
    assert packed.slots == 0
    assert_agrees(backend, random_query(packed), packed, random_tail(packed))
    assert stand_in.plans == 1


def test_several_queries_and_no_tail_are_for_triton(stand_in: type[Wrapper]) -> None:
    backend, packed = FlashInferBackend(), random_packed(tokens=20)
    assert_agrees(backend, random_query(packed), packed, None)
    assert_agrees(backend, random_query(packed, new=2), packed, None)
    ragged = random_tail(packed)
    assert_agrees(backend, random_query(packed), packed, Tail(ragged.keys.nan_to_num(), ragged.values.nan_to_num(),
                                                               ragged.lengths))  # fmt: skip
    assert stand_in.plans == 0


@pytest.mark.parametrize(
    ("dim", "dtype", "words"), [(48, torch.bfloat16, "heads of 48 channels"), (64, torch.float32, "not torch.float32")]
)
def test_what_flashinfer_lacks(
    stand_in: type[Wrapper], dim: int, dtype: torch.dtype, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend, packed = FlashInferBackend(), random_packed(tokens=20, dim=dim, dtype=dtype)
    for _ in range(2):
        assert_agrees(backend, random_query(packed), packed, random_tail(packed, dtype=dtype))
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert words in record.getMessage()
    assert "'triton' takes its place" in record.getMessage()
    assert stand_in.plans == 0


def test_kernels_that_do_not_compile(
    stand_in: type[Wrapper], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stand_in, "plan", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("ninja: build stopped")))
    packed = random_packed(tokens=20, device="cpu")
    query, tail = random_query(packed), random_tail(packed)
    backend = ChosenBackend("flashinfer")
    backend.backend = FlashInferBackend()
    torch.testing.assert_close(
        backend.attend(query, packed, 0.1, tail), TorchBackend().attend(query, packed, 0.1, tail)
    )
    assert "ninja: build stopped" in caplog.text
    assert not isinstance(backend.backend, FlashInferBackend)


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flashinfer") is None, reason="needs a GPU and flashinfer"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_real_one(dtype: torch.dtype, dim: int, group: int) -> None:
    backend, packed = FlashInferBackend(), random_packed(3, 4, 700, dim, dtype)
    for length, capacity in ((1, 256), (2, 256), (256, 256), (300, 512)):
        query, tail = random_query(packed, group, dtype=dtype), random_tail(packed, length, capacity, dtype)
        assert_agrees(backend, query, packed, tail)
