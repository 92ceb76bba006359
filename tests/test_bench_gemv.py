"""The benchmark of a step's products, on tiny ones without a GPU: what it times agrees with float64, and its table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.speed import gemv, tables, timing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_records_and_table(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def microseconds(run: Callable[[Any], Any], weights: Sequence[Any]) -> float:
        for weight in weights:
            run(weight)
        ran.append(run)
        return 4.0

    monkeypatch.setattr(timing, "microseconds", microseconds)
    monkeypatch.setattr(timing, "copies", lambda nbytes: 2)
    products = gemv.products(hidden=32, inner=48, qkv=64, vocabulary=50)
    records = [gemv.measure(product, 1e9, DEVICE) | {"device": "none"} for product in products]
    assert [record["name"] for record in records] == ["qkv", "o", "gate_up", "down", "head"]
    assert len(ran) == 3 * len(records)
    for record in records:
        assert 0 < record["error"] < 0.03  # bfloat16, and cut off by Triton's interpreter
        assert record["bytes"] == 2 * record["rows"] * record["columns"]
        assert record["floor_us"] == pytest.approx(record["bytes"] / 1e3, rel=0.01)
    table = tables.gemv(records)
    assert "| gate_up | 96 x 32 | gated | 4.0 | 6.1 | 154% | 4.0 | 4.0 |" in table
