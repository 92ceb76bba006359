"""Eviction only: a token keeps 16 bits or goes. The ablation that shows what quantisation adds."""

from __future__ import annotations

import dataclasses

import torch

from ..runtime.interfaces import Allocator, Scope
from ..runtime.ladder import Ladder
from ..runtime.plan import BitPlan, Budget, Scores
from .fill import ROUNDS, fill
from .items import items
from .problem import ScopeOptions, pose
from .steps import Steps, step_table
from .waterlevel import make_search


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
        # Tokens that are whole, key and value, lie side by side without blocks.
        ladder = dataclasses.replace(ladder.restrict((0, 16)), token_block=1)
        tokens, device = items(problem, 1), problem.token.device
        table = step_table(ladder, tokens.count, device)
        steps = Steps.of(table.rows[-1].expand(*problem.token.shape[:2], -1))
        search = make_search(1.0, table.octaves, True, device)
        need = steps.whole.sum(1) - problem.available
        boundary = fill(tokens.weight, steps, need, False, search.first, search, ROUNDS)
        held = (boundary < tokens.count).expand_as(problem.channel)
        return problem.plan(tokens.spread(boundary, steps.width), held.to(torch.uint8) * 16)
