"""Random items, steps and water levels for the allocators' kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from rdkv.allocators.steps import Steps, step_table
from rdkv.plugins.rdkv.format import MixedBit


@dataclass(frozen=True)
class Levels:
    """Items ``[P, h, n]`` with their sums, steps at ``J`` points ``[P, h, J, S]``, and falling water levels."""

    weight: Tensor
    mass: Tensor
    rows: Tensor
    water: Tensor

    @property
    def points(self) -> Steps:
        return Steps.of(self.rows)

    @property
    def steps(self) -> Steps:
        """Those at one point of each head."""
        return Steps.of(self.rows[:, :, -1])


@st.composite
def levels(draw: st.DrawFn) -> Levels:
    """Ties, heads without a step, one level for all problems or some for each, ladders of one step to four."""
    problems, heads, n = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    widths = draw(st.sampled_from([(0, 2, 4, 8, 16), (0, 2), (0, 2, 8, 16), (2, 4, 16)]))
    weight = torch.randn(problems, heads, n, generator=generator).mul(3).exp().double()
    if draw(st.booleans()):
        weight = weight.log2().round().exp2()
    weight = (weight / weight.sum((1, 2), keepdim=True)).sort(-1).values
    table = step_table(MixedBit().ladder(32, 16 * n).restrict(widths), n, weight.device)
    row = torch.randint(len(table.rows), (problems, heads, draw(st.integers(1, 20))), generator=generator)
    water = torch.logspace(1, -18, draw(st.integers(3, 20)), 2.0, dtype=torch.float64)
    water = water * torch.rand(draw(st.sampled_from([1, problems])), 1, generator=generator).add(0.5)
    mass = torch.nn.functional.pad(weight.cumsum(-1), (1, 0))
    return Levels(weight, mass, table.rows[row], water)
