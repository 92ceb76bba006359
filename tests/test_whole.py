"""Segments of plans that keep all as it is, or nothing."""

from __future__ import annotations

import torch
from mixed import empty, make_case

from rdkv.plugins.rdkv.format import MixedBit
from rdkv.plugins.rdkv.whole import EmptySegment, WholeSegment


def test_whole_segment_is_bit_exact_and_costs_the_full_cache() -> None:
    case = make_case(torch.full((2, 3, 5), 16), torch.full((2, 3, 80), 16), empty(2, 3, 5))
    segment = case.pack()
    assert isinstance(segment, WholeSegment)
    keys, values, held = segment.unpack()
    assert torch.equal(keys, case.keys.float())
    assert torch.equal(values, case.values.float())
    assert bool(held.all())
    assert segment.nbytes == 2 * 2 * 3 * 5 * 80 * 2
    assert segment.nbytes * 8 == int(MixedBit().ladder(80, 5).cost(case.plan).sum())
    assert segment.plan().is_identity


def test_whole_segment_survives_changes_to_what_it_was_packed_from() -> None:
    case = make_case(torch.full((1, 1, 5), 16), torch.full((1, 1, 32), 16), empty(1, 1, 5))
    segment = case.pack()
    before = case.keys.float()
    case.keys.zero_()
    assert torch.equal(segment.unpack()[0], before)


def test_empty_segment_holds_nothing() -> None:
    case = make_case(torch.zeros(2, 3, 5), torch.full((2, 3, 80), 4), empty(2, 3, 5))
    segment = case.pack()
    assert isinstance(segment, EmptySegment)
    assert segment.nbytes == 0
    assert int(MixedBit().ladder(80, 5).cost(case.plan).sum()) == 0
    keys, values, held = segment.unpack()
    assert keys.shape == values.shape == (2, 3, 0, 80)
    assert held.shape == (2, 3, 0)
    plan = segment.plan()
    assert plan.value_bits.shape == (2, 3, 5)
    assert plan.key_bits.shape == (2, 3, 80)
    assert not bool(plan.kept.any())
    output, lse = segment.attend(torch.randn(2, 6, 1, 80), 1.0)
    assert output.shape == (2, 6, 1, 80)
    assert not bool(output.any())
    assert bool((lse == -float("inf")).all())
