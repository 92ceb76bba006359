"""The path of key widths: gains per bit fall along it, and its sums are those of its widths."""

from __future__ import annotations

import torch
from hypothesis import given
from problems import (
    Problem,
    problems,
    quick,
)

from rdkv.allocators.keypath import key_path
from rdkv.runtime.ladder import lookup


@quick
@given(problem=problems())
def test_key_path_rises_by_gain_per_bit(problem: Problem) -> None:
    ladder, channel = problem.ladder, problem.scores.channel.double()
    path = key_path(channel, ladder)
    gain, bits = -path.loss.diff(dim=-1), path.bits.diff(dim=-1)
    assert bool((bits > 0).all())
    rate = gain / bits
    assert bool((rate.diff(dim=-1) <= 1e-9 * rate[..., :-1] + 1e-15).all())
    points = path.bits.shape[-1]
    for point in (0, 1, points // 2, points - 1):
        widths = path.widths(torch.full(channel.shape[:2], point), ladder.key_bits)
        assert torch.equal(lookup(widths, ladder.key_bits, ladder.key_cost).sum(-1), path.bits[..., point])
        assert torch.equal(lookup(widths, ladder.key_bits, ladder.key_overhead).sum(-1), path.overhead[..., point])
        lost = (channel * lookup(widths, ladder.key_bits, ladder.key_distortion)).sum(-1)
        torch.testing.assert_close(path.loss[..., point], lost)
        ordered = widths.gather(-1, channel.argsort(dim=-1, descending=True, stable=True)).int()
        assert bool((ordered.diff(dim=-1) <= 0).all())  # the more a channel weighs, the wider
        for start in range(0, ladder.head_dim, ladder.channel_group):
            part = ordered[..., start : start + ladder.channel_group]
            assert bool((part == part[..., :1]).all())
