"""What the runtime demands of a plugin's results; a breach names the plugin and the layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite, isnan

import torch
from torch import Tensor

from ..kernels.available import kernels_for
from ..kernels.naive_checking import NO_WIDTH
from .discovery import one_line
from .errors import PluginError, RdkvError
from .findings import Finding, settle
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
    settle([examine_scores(scores, observation, scorer)])


def examine_scores(scores: Scores, observation: Observation, scorer: str) -> Finding:
    """As `check_scores`, but what only the device knows is left in a finding: least and greatest of each field.

    Raises:
        PluginError: for a type, a shape or a device.
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
    if scores.pinned is not None:
        _check_tensor(scores.pinned, (batch, heads, tokens), observation.keys.device, f"{where}: pinned")
        if scores.pinned.dtype != torch.bool:
            raise PluginError(f"{where}: pinned is {scores.pinned.dtype}, not torch.bool")

    def judge(figures: list[float]) -> None:
        for name, (low, high) in zip(("token", "channel"), (figures[:2], figures[2:]), strict=True):
            if not (isfinite(low) and isfinite(high)):
                kind = "NaN" if isnan(low) else "infinite"
                raise PluginError(f"{where}: some {name} scores are {kind}")
            if low < 0:
                raise PluginError(f"{where}: some {name} scores are negative ({low:.3g})")

    figures: Tensor = kernels_for("checking", scores.token).score_figures(scores.token, scores.channel)
    return Finding(figures, judge)


def defuse(scores: Scores, finding: Finding) -> Scores:
    """Scores that any allocator survives: all zero where their finding is going to object."""
    token, channel = kernels_for("checking", scores.token).sound_scores(scores.token, scores.channel, finding.figures)
    return Scores(token, channel, scores.pinned)


def examine_plan(
    plan: BitPlan,
    scores: Scores,
    ladder: Ladder,
    budget: Budget,
    allocator: str,
    scope: Scope,
    layer: str,
    layers: int = 1,
) -> Finding:
    """Whether a plan has the scores' shape, keeps to the ladder and stays within the budget.

    Args:
        layers: how many layers' heads are side by side in the plan.

    Returns:
        Least width of values and of keys that is not the ladder's, bits of the dearest head or sequence, and
        then the bits of every layer. Its objection says by how many bytes an allocator overspends, or which
        width it made up.

    Raises:
        PluginError: for a type, a shape or a device.
    """
    where = f"allocator {allocator!r}, {layer}"
    if not isinstance(plan, BitPlan):
        raise PluginError(f"{where}: allocate() returned {type(plan).__name__}, not BitPlan")
    fields = (
        ("value_bits", plan.value_bits, scores.token, torch.uint8),
        ("key_bits", plan.key_bits, scores.channel, torch.uint8),
        ("pinned", plan.pinned, scores.token, torch.bool),
    )
    for name, tensor, like, dtype in fields:
        _check_tensor(tensor, tuple(like.shape), like.device, f"{where}: {name}")
        if tensor.dtype != dtype:
            raise PluginError(f"{where}: {name} is {tensor.dtype}, not {dtype}")
    levels = {"value_bits": ladder.value_bits, "key_bits": ladder.key_bits}
    limit, whose = (budget.per_head, " a head") if scope == "head" else (budget.total, "")

    def judge(figures: list[float]) -> None:
        for (name, known), odd in zip(levels.items(), figures, strict=False):
            if odd < NO_WIDTH:
                raise PluginError(f"{where}: {name} has a width of {odd:.0f} bits; the format has {known}")
        if figures[2] > limit:
            over = (int(figures[2]) - limit + 7) // 8
            raise PluginError(f"{where}: overspends the budget of {limit // 8} bytes{whose} by {over} bytes")

    tensors = (plan.value_bits, plan.key_bits, plan.pinned)
    prices = ladder.prices(scores.token.device)
    figures: Tensor = kernels_for("checking", scores.token).plan_figures(*tensors, prices, scope == "head", layers)
    return Finding(figures, judge)


def defuse_plan(plan: BitPlan, finding: Finding) -> BitPlan:
    """A plan that any format survives: it keeps nothing where its finding is going to object to its widths."""
    tensors = (plan.value_bits, plan.key_bits, plan.pinned)
    return BitPlan(*kernels_for("checking", plan.value_bits).sound_plan(*tensors, finding.figures))


def check_segment(segment: PackedSegment, promised: int, format_: str, layer: int) -> None:
    """Raise if a packed segment holds more than the ``promised`` bits, those of its format's ladder.

    Raises:
        PluginError: with both figures.
    """
    if not isinstance(segment, PackedSegment):
        raise PluginError(f"format {format_!r}, layer {layer}: pack() returned {type(segment).__name__}")
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
