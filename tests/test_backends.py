"""Which backend is taken, what is said when it is another one, and that all of them agree."""

from __future__ import annotations

import gc
import importlib
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from packs import random_packed, random_query, random_tail
from torch import Tensor

from rdkv.kernels import backends, naive_decode
from rdkv.kernels.backends import Backend, ChosenBackend, TorchBackend, automatic, choose, probe
from rdkv.kernels.packed import Packed
from rdkv.kernels.tail import Tail

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
Warnings = Callable[[], list[str]]
pytestmark = pytest.mark.usefixtures("fresh_backends")


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Warnings:
    def messages() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    return messages


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which triton compiles and flashinfer is installed, as far as anyone asks."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))


def verdicts(device: torch.device) -> dict[str, tuple[bool, str]]:
    return {name: (works, reason) for name, works, reason in probe(device)}


def test_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = verdicts(CPU)
    assert [works for works, _ in found.values()] == [True, False, False]
    assert found["triton"][1] == found["flashinfer"][1] == "needs a CUDA device"
    assert automatic(CPU) == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    works, reason = verdicts(CPU)["triton"]
    assert works
    assert "interpreter" in reason
    assert automatic(CPU) == "torch"  # the interpreter is for who asks for it


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [works for works, _ in verdicts(GPU).values()] == [True, True, True]
    assert "auto prefers triton" in verdicts(GPU)["flashinfer"][1]
    assert automatic(GPU) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    found = verdicts(GPU)
    assert "8.0; this one has 7.5" in found["triton"][1]
    assert "triton" in found["flashinfer"][1]
    assert [works for works, _ in found.values()] == [True, False, False]
    assert automatic(GPU) == "torch"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("broken", ["triton", "flashinfer"])
def test_what_cannot_be_imported(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, broken, None)
    works, reason = verdicts(GPU)[broken]
    assert not works
    assert broken in reason
    assert "\n" not in reason
    real = importlib.import_module

    def failing(name: str) -> Any:
        if name == broken:
            raise OSError("libfoo.so:\nundefined symbol")
        return real(name)

    monkeypatch.setattr(backends, "import_module", failing)
    assert verdicts(GPU)[broken] == (False, "OSError: libfoo.so: undefined symbol")


def test_another_takes_its_place_and_says_so_once(monkeypatch: pytest.MonkeyPatch, warnings: Warnings) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for _ in range(2):
        for name in ("triton", "flashinfer"):
            assert choose(name, CPU).name == "torch"
    assert warnings() == [
        f"attention backend {name!r} does not work here (needs a CUDA device); 'torch' takes its place"
        for name in ("triton", "flashinfer")
    ]
    assert choose("auto", CPU).name == choose("torch", CPU).name == "torch"
    assert len(warnings()) == 2
    with pytest.raises(ValueError, match="unknown attention backend 'cuda'; there are auto, torch"):
        choose("cuda", CPU)


class Failing(Backend):
    """Fails in use, as a kernel that does not compile does."""

    def __init__(self, name: str, error: Exception) -> None:
        self.name, self.error = name, error  # type: ignore[misc]

    def attend(self, query: Tensor, packed: Packed, scale: float, tail: Tail | None = None) -> tuple[Tensor, Tensor]:
        raise self.error


def chosen(name: str, error: Exception) -> ChosenBackend:
    backend = ChosenBackend(name)
    backend.backend = Failing(name, error)
    return backend


@pytest.mark.parametrize("name", ["triton", "flashinfer"])
def test_failure_in_use_is_a_message_and_for_good(name: str, warnings: Warnings) -> None:
    packed = random_packed(tokens=20, device="cpu")
    query, tail = random_query(packed), random_tail(packed)
    backend = chosen(name, RuntimeError("nvcc: not\nfound"))
    expected = TorchBackend().attend(query, packed, 0.1, tail)
    for _ in range(2):
        torch.testing.assert_close(backend.attend(query, packed, 0.1, tail), expected)
    assert backend.backend is not None
    assert backend.backend.name == "torch"
    reason = "failed in use: RuntimeError: nvcc: not found"
    assert warnings() == [f"attention backend {name!r} does not work here ({reason}); 'torch' takes its place"]
    assert verdicts(CPU)[name] == (False, reason)
    assert choose(name, CPU).name == "torch"


@pytest.mark.usefixtures("gpu")
def test_after_flashinfer_comes_triton() -> None:
    backends._failures["flashinfer"] = "failed in use: x"
    assert automatic(GPU) == "triton"
    backends._failures["triton"] = "failed in use: y"
    assert automatic(GPU) == "torch"


def test_errors_that_are_passed_on(warnings: Warnings) -> None:
    packed = random_packed(tokens=20, device="cpu")
    query = random_query(packed)
    for name, error in (("triton", torch.OutOfMemoryError("full")), ("torch", ValueError("shape"))):
        with pytest.raises(type(error)):
            chosen(name, error).attend(query, packed, 0.1)
    assert not warnings()


def test_torch_is_the_twin() -> None:
    packed = random_packed()
    query, tail = random_query(packed, group=3), random_tail(packed)
    twin = Tail(tail.keys.nan_to_num(), tail.values.nan_to_num(), tail.lengths)
    for after, same in ((None, None), (tail, twin)):
        expected = naive_decode.attend(query, packed, 0.1, same)
        torch.testing.assert_close(TorchBackend().attend(query, packed, 0.1, after), expected)
    assert not list(TorchBackend().tensors())


def assert_agrees(backend: Backend, query: Tensor, packed: Packed, tail: Tail | None) -> None:
    output, lse = backend.attend(query, packed, 0.1, tail)
    expected, expected_lse = TorchBackend().attend(query, packed, 0.1, tail)
    assert output.shape == expected.shape
    torch.testing.assert_close(output.float(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)


def triton_backend() -> Any:
    pytest.importorskip("triton")
    from rdkv.kernels.backend_triton import TritonBackend

    return TritonBackend()


def test_triton_agrees_and_keeps_its_plans() -> None:
    backend, packed = triton_backend(), random_packed(tokens=40)
    query = random_query(packed)
    for tail in (None, random_tail(packed, 5, 16), random_tail(packed, 16, 16), random_tail(packed, 17, 32)):
        assert_agrees(backend, query, packed, tail)
        assert backend.attend(query, packed, 0.1, tail)[0].dtype == (torch.float32 if tail is None else query.dtype)
    first = backend.plan(packed, packed.batch, 32)
    assert backend.plan(packed, packed.batch, 32) is first
    assert backend.plan(packed, packed.batch, 64) is not first
    assert len(list(backend.tensors())) == 2 * 2  # with a tail and without
    del packed, query, tail
    gc.collect()
    assert not list(backend.tensors())


@pytest.mark.parametrize("case", ["queries", "tail", "float32", "channels"])
def test_what_triton_leaves_to_torch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = triton_backend()
    monkeypatch.setattr("rdkv.kernels.decode.attend", lambda *_: pytest.fail("not for the kernels"))
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    packed = random_packed(tokens=20, dim=272 if case == "channels" else 64, dtype=dtype)
    query = random_query(packed, new={"queries": 33, "tail": 2}.get(case, 1))
    tail = random_tail(packed) if case == "tail" else None
    assert_agrees(backend, query, packed, tail)
