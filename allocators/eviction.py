"""Eviction only: a token keeps 16 bits or goes. The ablation that shows what quantisation adds."""

from __future__ import annotations

import torch

from ..runtime.interfaces import Allocator, Scope
from ..runtime.ladder import Ladder
from ..runtime.plan import BitPlan, Budget, Scores
from .fill import fill
from .problem import ScopeOptions, pose
from .waterfill import token_cost


class Eviction(Allocator):
    """The tokens of highest score at 16 bits, as many as the budget holds; keys are never quantised.

    With scope ``head`` every head keeps the same number (SnapKV, arXiv 2404.14469); with ``layer`` heads
    compete by their share of the layer's scores (AdaKV, arXiv 2407.11550).
    """

    Options = ScopeOptions
    options: ScopeOptions

    @property
    def scope(self) -> Scope:
        return self.options.scope

    def allocate(self, scores: Scores, ladder: Ladder, budget: Budget) -> BitPlan:
        problem = pose(scores, ladder, budget, self.scope)
        if isinstance(problem, BitPlan):
            return problem
        ladder = ladder.restrict((0, 16))
        key_bits = torch.full(problem.channel.shape, 16, device=problem.channel.device)
        cost = token_cost(ladder, key_bits.sum(-1, keepdim=True))
        distortion = torch.tensor(ladder.value_distortion, dtype=torch.float64, device=cost.device)
        level = fill(problem.token, problem.free, cost, distortion, problem.available)
        return problem.plan(level * 16, key_bits)
