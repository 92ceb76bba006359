"""The path of key widths: gains per bit fall along it, and its sums are those of its widths."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Problem, lookup, problems, quick, random_problem

from rdkv.allocators.keypath import key_path
from rdkv.kernels.naive_checking import round_up


@quick
@given(problem=st.one_of(problems(), problems(block=16)))
def test_key_path_rises_by_gain_per_bit(problem: Problem) -> None:
    ladder, channel = problem.ladder, problem.scores.channel
    path = key_path(channel, ladder)
    share = channel.double() / channel.double().sum((1, 2), keepdim=True).clamp(min=1e-60)
    points = path.row.shape[-1]
    rate, exact = [], []
    for point in range(1, points):
        widths = path.widths(torch.full(channel.shape[:2], point), ladder)
        bits = lookup(widths, ladder.key_bits, ladder.key_cost).sum(-1)
        assert torch.equal(path.row[..., point] - 1, round_up(bits, ladder.key_block) // ladder.key_block)
        assert torch.equal(
            path.overhead[..., point].long(), lookup(widths, ladder.key_bits, ladder.key_overhead).sum(-1)
        )
        lost = (share * lookup(widths, ladder.key_bits, ladder.key_distortion)).sum(-1)
        torch.testing.assert_close(path.loss[..., point], lost)
        exact.append(bits)
        rate.append(path.loss[..., point])
        ordered = widths.gather(-1, channel.argsort(dim=-1, descending=True, stable=True)).int()
        assert bool((ordered.diff(dim=-1) <= 0).all())  # the more a channel weighs, the wider
        for start in range(0, ladder.head_dim, ladder.channel_group):
            part = ordered[..., start : start + ladder.channel_group]
            assert bool((part == part[..., :1]).all())
    bits, gain = torch.stack(exact, -1).diff(dim=-1), -torch.stack(rate, -1).diff(dim=-1)
    assert bool((bits > 0).all())
    rates = gain / bits
    assert bool((rates.diff(dim=-1) <= 1e-9 * rates[..., :-1] + 1e-15).all())


def test_point_0_is_a_head_without_tokens() -> None:
    problem = random_problem(dim=64)
    path = key_path(problem.scores.channel, problem.ladder)
    assert bool((path.row[..., 0] == 0).all())
    assert bool((path.overhead[..., 0] == 0).all())
    torch.testing.assert_close(path.loss[..., 0], path.loss[..., 1])
    assert not bool(path.widths(torch.zeros(1, 2, dtype=torch.int64), problem.ladder).any())
