"""The stopwatch: spans add up, and a GPU is not waited for before they are read."""

from __future__ import annotations

import time

import pytest
import torch

from rdkv.runtime.stopwatch import Stopwatch


def test_spans_add_up() -> None:
    stopwatch = Stopwatch()
    assert stopwatch.seconds == 0
    for _ in range(2):
        with stopwatch.running(torch.device("cpu")):
            time.sleep(0.01)
        time.sleep(0.1)
    assert 0.02 <= stopwatch.seconds < 0.1
    assert stopwatch.seconds == stopwatch.seconds


def test_what_fails_does_not_count() -> None:
    stopwatch = Stopwatch()
    with pytest.raises(ValueError, match="no"), stopwatch.running(torch.device("cpu")):
        raise ValueError("no")
    assert stopwatch.seconds == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="time on a GPU")
def test_time_of_a_gpu_is_its_own() -> None:
    device, stopwatch = torch.device("cuda"), Stopwatch()
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    torch.cuda._sleep(500_000_000)  # cycles, some 0.3 s: before the span, so not of it
    with stopwatch.running(device):
        torch.cuda._sleep(100_000_000)
    assert time.perf_counter() - begin < 0.1
    assert 0.02 < stopwatch.seconds < 0.2
    assert stopwatch.seconds == stopwatch.seconds
