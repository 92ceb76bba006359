"""Quantisation only: every token stays. The ablation that shows what eviction adds."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import msgspec

from ..runtime.errors import BudgetError
from ..runtime.interfaces import Allocator, Scope
from ..runtime.ladder import Ladder
from ..runtime.plan import BitPlan, Budget, Scores
from .problem import ScopeOptions, pose, uniform_plan
from .waterfill import water_fill


class QuantizationOptions(ScopeOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of ``quantization``."""

    mode: Annotated[
        Literal["mixed", "uniform"],
        msgspec.Meta(description="mixed: widths by water-filling; uniform: the widest one that fits for everything"),
    ] = "mixed"


class Quantization(Allocator):
    """Widths of at least the format's lowest above 0 for every token and channel.

    Raises:
        BudgetError: even the lowest width of every token is more than the budget.
    """

    Options = QuantizationOptions
    options: QuantizationOptions

    @property
    def scope(self) -> Scope:
        return self.options.scope

    @property
    def evicts(self) -> bool:
        return False

    def allocate(self, scores: Scores, ladder: Ladder, budget: Budget) -> BitPlan:
        widths = tuple(b for b in ladder.value_bits if b > 0)
        fitting = [b for b in widths if _fits(uniform_plan(scores, b), ladder, budget)]
        if not fitting:
            plan = uniform_plan(scores, widths[0])
            least = int(ladder.cost(plan).amax()) / ladder.full_cost
            raise BudgetError(
                f"no width keeps every token within the budget: {widths[0]} bits take {least:.1%} of the full cache; "
                "raise the budget, or choose an allocator that evicts"
            )
        if self.options.mode == "uniform" or fitting[-1] == 16:
            return uniform_plan(scores, fitting[-1])
        # Pinned tokens would need bytes beyond the uniform plan that is known to fit.
        problem = pose(dataclasses.replace(scores, pinned=None), ladder, budget, self.scope)
        if isinstance(problem, BitPlan):
            return problem
        return water_fill(problem, ladder.restrict(widths), key_weight=1.0, key_share=None)


def _fits(plan: BitPlan, ladder: Ladder, budget: Budget) -> bool:
    return bool((ladder.cost(plan) <= budget.per_head).all())
