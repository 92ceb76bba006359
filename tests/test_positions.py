"""The plan that a packed segment was made by, from its positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from mixed import ALL_WIDTHS, ONE_HEAD_EMPTY, ONE_HEAD_RAW, ONLY_PINNED, Case, cases, quick

from rdkv.plugins.rdkv.segment import MixedBitSegment
from rdkv.runtime.errors import ConfigError


@quick
@given(cases())
@example(ALL_WIDTHS)
@example(ONLY_PINNED)
@example(ONE_HEAD_EMPTY)
@example(ONE_HEAD_RAW)
def test_plan_comes_back(case: Case) -> None:
    plan, packed = case.plan, case.pack().plan()
    coded = (plan.value_bits > 0) & ~plan.pinned
    assert packed.value_bits.dtype == packed.key_bits.dtype == torch.uint8
    assert torch.equal(packed.value_bits, plan.value_bits.masked_fill(plan.pinned, 16))
    if plan.is_identity:  # nothing is set apart where everything is kept
        assert not bool(packed.pinned.any())
        assert bool((packed.key_bits == 16).all())
        return
    assert torch.equal(packed.pinned, plan.pinned)
    assert torch.equal(packed.key_bits, plan.key_bits * coded.any(-1, keepdim=True))


def test_positions_can_be_dropped() -> None:
    kept, dropped = ALL_WIDTHS.pack(), ALL_WIDTHS.pack(positions=False)
    assert isinstance(dropped, MixedBitSegment)
    assert dropped.positions is None
    assert dropped.nbytes < kept.nbytes
    assert all(map(torch.equal, dropped.unpack(), kept.unpack()))
    with pytest.raises(ConfigError, match="positions=true"):
        dropped.plan()
