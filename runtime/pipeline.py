"""From one layer's keys, values and queries to packed segments: score, allocate, pack, each checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .budget import head_weights, layer_bits, layer_shares
from .calibration import calibrated_name, load_calibration
from .checks import blame, check_segment, defuse, defuse_plan, examine_plan, examine_scores
from .config import CompressionConfig
from .findings import Finding, Inquiry
from .interfaces import Allocator, CacheFormat, PackedSegment, Scorer
from .ladder import Ladder
from .observation import Observation
from .plan import BitPlan, Budget, Scores
from .registry import load_registry
from .storage import half_dtype
from .support import text_config


@dataclass
class Pending:
    """A scored layer that is not packed yet; 16-bit keys and values live in it.

    What was found about its scores is not read yet: the device need not be waited for until they are allocated.
    """

    keys: Tensor
    values: Tensor
    scores: Scores
    finding: Finding
    layer: int


@dataclass(frozen=True)
class Planned:
    """One layer's plan, what is still to be read about it, and whether it keeps everything as it is.

    Attributes:
        verdict: of all layers that share a budget.
        place: of this layer among them.
    """

    plan: BitPlan
    verdict: Verdict
    place: int
    whole: bool

    @property
    def bits(self) -> int:
        """Bits that the plan costs, see `Verdict.bits`."""
        return self.verdict.bits[self.place]


class Verdict:
    """What the checks of scores and plans found, sent for at once and read when it is first asked for."""

    def __init__(self, findings: list[Finding]) -> None:
        self._inquiry = Inquiry(findings)

    @cached_property
    def bits(self) -> list[int]:
        """Bits of each layer; waits for the device until the plans are made and checked.

        Raises:
            PluginError: the scorer's or the allocator's result breaks its contract.
        """
        *_, (_, _, _, *bits) = self._inquiry.settle()
        return [int(cost) for cost in bits]


class Pipeline:
    """The plugins of one configuration, made for one model.

    Args:
        first_head: of each layer's KV heads, where those start that it is given; 0 for all of them.
    """

    def __init__(self, model_config: Any, config: CompressionConfig, first_head: int = 0) -> None:
        registry = load_registry(config.plugins)
        self.config = config
        self.layers = int(text_config(model_config).num_hidden_layers)
        self.scorer: Scorer = registry.scorer(config.scorer, config.scorer_options)
        self.allocator: Allocator = registry.allocator(config.allocator, config.allocator_options)
        self.format: CacheFormat = registry.format(config.format, config.format_options)
        name = calibrated_name(config.format, self.format)
        found = load_calibration(model_config, name, config.calibration, self.format.shipped_calibration)
        self.distortion = found.distortion if found else None
        known = found.layers if found and config.budget_by != "even" and self.allocator.evicts else ()
        self.shares = layer_shares(known) if known else (1.0,) * self.layers
        self._first_head = first_head
        self._head_weights = [head_weights(row) for row in found.heads] if found and config.budget_by == "head" else []

    @property
    def whole_model(self) -> bool:
        """Whether nothing can be packed before the last layer was scored."""
        return self.allocator.scope == "model"

    def score(self, observation: Observation) -> Pending:
        """Score one layer, and keep what packing needs: keys and values in their storage type."""
        with blame(f"scorer {self.config.scorer!r}", f"layer {observation.layer}"):
            scores = self.scorer.score(observation)
        finding = examine_scores(scores, observation, self.config.scorer)
        dtype = self.storage_dtype(observation)
        return Pending(observation.keys.to(dtype), observation.values.to(dtype), scores, finding, observation.layer)

    def storage_dtype(self, observation: Observation) -> torch.dtype:
        """Type of everything that is not quantised: the model's if it has 16 bits.

        A float32 cache is held in float16 (bfloat16 where it exceeds float16's range), since bytes are
        measured against a 16-bit cache; at a budget of 1.0, which compresses nothing, it stays as it is.
        """
        keys, values = observation.keys, observation.values
        if keys.dtype != torch.float32:
            return keys.dtype
        if self.config.budget == 1.0:
            return torch.float32
        return half_dtype(keys, values)

    def ladder(self, tokens: int, head_dim: int) -> Ladder:
        """The format's ladder for a prompt of ``tokens`` tokens."""
        return self.format.ladder(head_dim, tokens, self.distortion)

    def allocate(self, layers: list[Pending]) -> list[Planned]:
        """Plans of layers that share a budget: one layer, or all of the model for scope ``model``.

        The device is not waited for but where the budget could hold a layer as it is: what is wrong with scores
        or plan comes out when the layer is finished, see `begin`.
        """
        first = layers[0]
        _, heads, tokens, dim = first.keys.shape
        ladder = self.ladder(tokens, dim)
        bits = layer_bits(self.config, tokens, dim, heads, self.shares)
        each = sum(bits[layer.layer] for layer in layers) // len(layers)
        budget = Budget(each, heads * len(layers))
        scores = _stack([self._weighed(layer) for layer in layers])
        name = f"layer {first.layer}" if len(layers) == 1 else f"layers {first.layer} to {layers[-1].layer}"
        allocator, scope = self.config.allocator, self.allocator.scope
        with blame(f"allocator {allocator!r}", name):
            plan = self.allocator.allocate(scores, ladder, budget)
        finding = examine_plan(plan, scores, ladder, budget, allocator, scope, name, len(layers))
        plan = defuse_plan(plan, finding)
        fields = (torch.split(t, heads, 1) for t in (plan.value_bits, plan.key_bits, plan.pinned))
        plans = [BitPlan(*part) for part in zip(*fields, strict=True)]
        verdict = Verdict([*(layer.finding for layer in layers), finding])
        # Where there is enough to keep one layer it is worth asking the device whether a plan does.
        roomy = budget.total >= heads * ladder.full_cost and bool(verdict.bits)
        return [Planned(part, verdict, i, roomy and part.is_identity) for i, part in enumerate(plans)]

    def _weighed(self, layer: Pending) -> Scores:
        """A layer's scores, times what its heads weigh."""
        scores = defuse(layer.scores, layer.finding)
        if not self._head_weights:
            return scores
        first = self._first_head
        heads = self._head_weights[layer.layer][first : first + layer.keys.shape[1]]
        weight = _column(heads, scores.token.device)
        return Scores(scores.token * weight, scores.channel * weight, scores.pinned)

    def begin(self, layer: Pending, planned: Planned) -> Callable[[], PackedSegment]:
        """Begin to pack one layer; what it returns finishes that, and holds keys and values until then.

        Raises:
            PluginError: of the scorer or the allocator, if it is to blame, or else of the format; here or from what
                it returns.
        """
        with self._packing(layer.layer, planned):
            finish = self.format.begin(layer.keys, layer.values, planned.plan)
        checked = layer.keys.dtype != torch.float32
        return partial(self._finish, finish, planned, layer.layer, checked)

    def _finish(
        self, finish: Callable[[], PackedSegment], planned: Planned, layer: int, checked: bool
    ) -> PackedSegment:
        with self._packing(layer, planned):
            segment = finish()
        bits = planned.bits
        if checked:
            check_segment(segment, bits, self.config.format, layer)
        return segment

    @contextmanager
    def _packing(self, layer: int, planned: Planned) -> Iterator[None]:
        """Blame the format for an error, unless it was given what no format can pack."""
        try:
            with blame(f"format {self.config.format!r}", f"layer {layer}"):
                yield
        except Exception:
            planned.verdict.bits  # noqa: B018
            raise


@cache  # while a tensor is sent to a GPU the GPU is waited for
def _column(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """``[1, H, 1]`` float32."""
    return torch.tensor(numbers, device=device)[None, :, None]


def _stack(scores: list[Scores]) -> Scores:
    """Scores of several layers side by side in the head dimension."""
    if len(scores) == 1:
        return scores[0]
    pins = [torch.zeros_like(s.token, dtype=torch.bool) if s.pinned is None else s.pinned for s in scores]
    token, channel = torch.cat([s.token for s in scores], 1), torch.cat([s.channel for s in scores], 1)
    return Scores(token, channel, torch.cat(pins, 1))
