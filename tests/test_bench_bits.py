"""Histograms and maps of a plan."""

from __future__ import annotations

import pytest
import torch

from bench.quality.bits import BINS, bit_maps
from rdkv import BitPlan


def test_maps_of_two_sequences() -> None:
    plans = [BitPlan.uniform((2, 3, 64, 4), bits, torch.device("cpu")) for bits in (4, 8)]
    plans[0].pinned[1, 0, :4] = True  # of the second sequence, in the first layer's first head
    plans[1].value_bits[0, 2] = 0
    plans[1].key_bits[:, :, :2] = 2
    first, second = bit_maps(plans)
    assert first["value_bits"] == pytest.approx({"0": 1 / 6, "4": 1 / 2, "8": 1 / 3}, abs=1e-5)
    assert second["value_bits"] == pytest.approx({"4": 0.5 - 4 / 384, "8": 0.5, "pinned": 4 / 384}, abs=1e-5)
    assert first["key_bits"] == {"2": 0.25, "4": 0.5, "8": 0.25}
    assert first["heads"] == [[4, 4, 4], [8, 8, 0]]
    assert second["heads"] == [[4 + 12 * 4 / 64, 4, 4], [8, 8, 8]]
    assert (len(first["positions"]), len(first["positions"][0])) == (2, BINS)
    assert second["positions"][0][:3] == [8, 8, 4]  # four tokens are two bins, and one head of three is pinned there


def test_a_short_prompt_has_as_many_bins() -> None:
    (row,) = bit_maps([BitPlan.uniform((1, 1, 5, 4), 2, torch.device("cpu"))])
    assert row["positions"] == [[2.0] * BINS]
