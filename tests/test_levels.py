"""Thresholds against the Lagrangian they stand for."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import (
    quick,
)

from rdkv.allocators.levels import hull, thresholds


@quick
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=5),
    st.lists(st.integers(1, 1000), min_size=5, max_size=5),
    st.floats(-9, 9),
)
def test_thresholds_are_those_of_the_lagrangian(rises: list[int], drops: list[int], power: float) -> None:
    cost = torch.tensor([0, *rises]).cumsum(0)
    distortion_ = torch.tensor([0, *drops[: len(rises)]]).flip(0).cumsum(0).flip(0).double()
    distortion_ = torch.cat([distortion_[1:].flip(0).cumsum(0).flip(0), torch.zeros(1)])
    assume(bool((distortion_.diff() < 0).all()))
    bar = thresholds(cost, distortion_)
    assert bool((bar.diff() >= 0).all())
    weight = 10.0**power
    lagrangian = weight * distortion_ + cost
    level = int((weight >= bar).sum())
    assert float(lagrangian[level]) <= float(lagrangian.min()) * (1 + 1e-12)
    on_hull = hull(bar)
    assert level == 0 or bool(on_hull[level - 1])
