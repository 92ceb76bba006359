"""Numbers that are sent for, and waited for alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rdkv.kernels.transfer import Readback, send


def test_numbers_of_the_host_are_there() -> None:
    assert Readback(torch.arange(6).reshape(2, 3)).read() == [[0, 1, 2], [3, 4, 5]]
    assert Readback(torch.tensor([0.5, float("inf")], dtype=torch.float64)).read() == [0.5, float("inf")]


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def test_nothing_is_waited_for_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU: what is copied arrives when the event is waited for."""
    calls: list[str] = []
    copies: list[tuple[Tensor, Tensor]] = []

    class Event:
        def record(self, stream: Any) -> None:
            calls.append(f"recorded in {stream}")

        def synchronize(self) -> None:
            calls.append("waited")
            for target, source in copies:
                target += source.as_subclass(Tensor)

    def empty(shape: Any, dtype: torch.dtype, device: str, pin_memory: bool) -> Tensor:
        assert pin_memory
        return torch.zeros(shape, dtype=dtype, device=device).as_subclass(Host)

    class Host(Tensor):
        def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
            assert non_blocking
            copies.append((self, source))
            return self

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch, "empty", empty)
    readback = Readback(torch.tensor([3, 4]).as_subclass(OnGpu))
    assert len(copies) == 1
    assert calls == ["recorded in the stream of cpu"]
    assert readback.read() == [3, 4]
    assert calls[1:] == ["waited"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_the_gpu_gets_later_is_not_waited_for() -> None:
    numbers = torch.arange(4, device="cuda")
    torch.cuda._sleep(1)
    Readback(numbers).read()  # pinned memory is there from now on
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
        readback = Readback(numbers + 1)
        torch.cuda._sleep(2_000_000_000)  # a second
        after = torch.cuda.Event()
        after.record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert readback.read() == [1, 2, 3, 4]
    assert not after.query()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sending_waits_for_nothing() -> None:
    send(torch.arange(4), torch.device("cuda"))
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    before = torch.cuda.Event()
    before.record()
    sent = send(torch.arange(4), torch.device("cuda"))
    assert not before.query()
    assert sent.tolist() == [0, 1, 2, 3]


def test_what_is_sent_arrives() -> None:
    assert send(torch.arange(4), torch.device("cpu")).tolist() == [0, 1, 2, 3]
