"""Findings: read together, judged in order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from waits import Waits

from rdkv.runtime.errors import PluginError
from rdkv.runtime.findings import Finding, Inquiry, settle


def finding(name: str, *figures: float) -> Finding:
    """Figures that must not be negative."""

    def judge(numbers: list[float]) -> None:
        assert numbers == list(figures)
        if min(numbers) < 0:
            raise PluginError(name)

    return Finding(torch.tensor(figures, dtype=torch.float64), judge)


def test_each_finding_gets_its_own_figures() -> None:
    assert settle([finding("a", 1.0), finding("b", 2.0**50 + 1, 3.0), finding("c", 4.0)]) == [
        [1.0],
        [2.0**50 + 1, 3.0],
        [4.0],
    ]


def test_first_objection_is_raised() -> None:
    with pytest.raises(PluginError, match="b"):
        settle([finding("a", 1.0), finding("b", 2.0, -3.0), finding("c", -4.0)])


def test_figures_are_sent_for_together_and_read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits(monkeypatch, "rdkv.runtime.findings")
    inquiry = Inquiry([finding("a", 1.0), finding("b", 2.0, 3.0)])
    assert not waits.seen
    assert inquiry.settle() == [[1.0], [2.0, 3.0]]
    assert waits.seen == ["readback"]


def test_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    read = Tensor.tolist
    for name in ("item", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, name, lambda tensor, name=name: asked.append(name))
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: (asked.append("tolist"), read(tensor))[1])
    settle([finding("a", 1.0), finding("b", 2.0, 3.0)])
    monkeypatch.undo()
    assert asked == ["tolist"]
