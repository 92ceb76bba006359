"""What the runtime demands of a plugin's results; a breach names the plugin and the layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .discovery import one_line
from .errors import PluginError, RdkvError
from .interfaces import PackedSegment, Scope
from .ladder import Ladder
from .observation import Observation
from .plan import BitPlan, Budget, Scores


@contextmanager
def blame(plugin: str, where: str) -> Iterator[None]:
    """Put the name of the plugin and the layer before whatever error its code raises.

    Raises:
        PluginError: for an exception that is not ours; running out of memory is passed on as it is.
    """
    try:
        yield
    except RdkvError as error:
        raise type(error)(f"{plugin}, {where}: {error}") from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise PluginError(f"{plugin}, {where}: {one_line(error)}") from error


def check_scores(scores: Scores, observation: Observation, scorer: str) -> None:
    """Raise unless scores have the layer's shape and device and are finite and non-negative.

    Raises:
        PluginError: saying what is wrong with which field.
    """
    where = f"scorer {scorer!r}, layer {observation.layer}"
    if not isinstance(scores, Scores):
        raise PluginError(f"{where}: score() returned {type(scores).__name__}, not Scores")
    batch, heads, tokens, dim = observation.keys.shape
    for name, shape in (("token", (batch, heads, tokens)), ("channel", (batch, heads, dim))):
        weights = getattr(scores, name)
        _check_tensor(weights, shape, observation.keys.device, f"{where}: {name} scores")
        if weights.dtype != torch.float32:
            raise PluginError(f"{where}: {name} scores are {weights.dtype}, not torch.float32")
        if not bool(weights.isfinite().all()):
            kind = "NaN" if bool(weights.isnan().any()) else "infinite"
            raise PluginError(f"{where}: some {name} scores are {kind}")
        if bool((weights < 0).any()):
            raise PluginError(f"{where}: some {name} scores are negative ({float(weights.min()):.3g})")
    if scores.pinned is not None:
        _check_tensor(scores.pinned, (batch, heads, tokens), observation.keys.device, f"{where}: pinned")
        if scores.pinned.dtype != torch.bool:
            raise PluginError(f"{where}: pinned is {scores.pinned.dtype}, not torch.bool")


def check_plan(
    plan: BitPlan, scores: Scores, ladder: Ladder, budget: Budget, allocator: str, scope: Scope, layer: str
) -> None:
    """Raise unless a plan has the scores' shape, keeps to the ladder and stays within the budget.

    Raises:
        PluginError: saying by how many bytes an allocator overspends, or which width it made up.
    """
    where = f"allocator {allocator!r}, {layer}"
    if not isinstance(plan, BitPlan):
        raise PluginError(f"{where}: allocate() returned {type(plan).__name__}, not BitPlan")
    device = scores.token.device
    fields = (
        ("value_bits", plan.value_bits, scores.token, torch.uint8, ladder.value_bits),
        ("key_bits", plan.key_bits, scores.channel, torch.uint8, ladder.key_bits),
        ("pinned", plan.pinned, scores.token, torch.bool, None),
    )
    for name, tensor, like, dtype, levels in fields:
        _check_tensor(tensor, tuple(like.shape), device, f"{where}: {name}")
        if tensor.dtype != dtype:
            raise PluginError(f"{where}: {name} is {tensor.dtype}, not {dtype}")
        if levels is not None and (odd := set(torch.unique(tensor).tolist()) - set(levels)):
            raise PluginError(f"{where}: {name} has a width of {min(odd)} bits; the format has {levels}")
    cost = ladder.cost(plan)  # [B, H]
    limit, spent, whose = (budget.per_head, cost, " a head") if scope == "head" else (budget.total, cost.sum(1), "")
    if bool((spent > limit).any()):
        over = (int(spent.max()) - limit + 7) // 8
        raise PluginError(f"{where}: overspends the budget of {limit // 8} bytes{whose} by {over} bytes")


def check_segment(segment: PackedSegment, plan: BitPlan, ladder: Ladder, format_: str, layer: int) -> None:
    """Raise if a packed segment holds more bytes than its format's ladder said.

    Raises:
        PluginError: with both figures.
    """
    if not isinstance(segment, PackedSegment):
        raise PluginError(f"format {format_!r}, layer {layer}: pack() returned {type(segment).__name__}")
    promised = int(ladder.cost(plan).sum())
    if segment.nbytes * 8 > promised:
        raise PluginError(
            f"format {format_!r}, layer {layer}: holds {segment.nbytes} bytes, its ladder promised {promised // 8}"
        )


def _check_tensor(tensor: Tensor, shape: tuple[int, ...], device: torch.device, what: str) -> None:
    if not isinstance(tensor, Tensor):
        raise PluginError(f"{what}: expected a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != shape:
        raise PluginError(f"{what} have shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.device != device:
        raise PluginError(f"{what} are on {tensor.device}, expected {device}")
