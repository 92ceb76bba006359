"""Results of plugins that break the contract, field by field; tests/test_bad_plugins.py drives them through a model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rdkv.plugins.rdkv.format import MixedBit
from rdkv.plugins.rdkv.whole import WholeSegment
from rdkv.runtime.checks import blame, check_scores, check_segment, defuse, examine_plan, examine_scores
from rdkv.runtime.errors import BudgetError, ConfigError, PluginError
from rdkv.runtime.findings import settle
from rdkv.runtime.interfaces import Scope
from rdkv.runtime.observation import Observation
from rdkv.runtime.plan import BitPlan, Budget, Scores

B, H, T, D = 2, 3, 10, 32
OBSERVATION = Observation(torch.randn(B, H, T, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D), 1.0, 7)
LADDER = MixedBit().ladder(D, T)


def good_scores(**changes: Any) -> Scores:
    return dataclasses.replace(Scores(torch.ones(B, H, T), torch.ones(B, H, D)), **changes)


def good_plan(**changes: Any) -> BitPlan:
    """Four tokens of each head at 4 bits, one of them pinned."""
    value_bits = torch.zeros(B, H, T, dtype=torch.uint8)
    value_bits[..., :4] = 4
    pinned = torch.zeros(B, H, T, dtype=torch.bool)
    pinned[..., 0] = True
    plan = BitPlan(value_bits, torch.full((B, H, D), 4, dtype=torch.uint8), pinned)
    return dataclasses.replace(plan, **changes)


def with_value(tensor: Tensor, value: float) -> Tensor:
    """A copy with one element changed."""
    tensor = tensor.clone()
    tensor[-1, -1, -1] = value
    return tensor


def error_of(check: Any, *arguments: Any) -> str:
    with pytest.raises(PluginError) as error:
        check(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "scores",
    [
        good_scores(),
        good_scores(token=torch.zeros(B, H, T), channel=torch.zeros(B, H, D)),
        good_scores(pinned=torch.zeros(B, H, T, dtype=torch.bool)),
        good_scores(token=torch.full((B, H, T), 3e38)),
    ],
)
def test_good_scores(scores: Scores) -> None:
    check_scores(scores, OBSERVATION, "mine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": torch.ones(B, H, T + 1)}, "token scores have shape [2, 3, 11], expected [2, 3, 10]"),
        ({"token": torch.ones(B, H * T)}, "token scores have shape [2, 30], expected [2, 3, 10]"),
        ({"channel": torch.ones(B, H, T)}, "channel scores have shape [2, 3, 10], expected [2, 3, 32]"),
        ({"token": torch.ones(B, H, T).half()}, "token scores are torch.float16, not torch.float32"),
        ({"channel": torch.ones(B, H, D).double()}, "channel scores are torch.float64, not torch.float32"),
        ({"token": with_value(torch.ones(B, H, T), float("nan"))}, "some token scores are NaN"),
        ({"channel": with_value(torch.ones(B, H, D), float("nan"))}, "some channel scores are NaN"),
        ({"token": with_value(torch.ones(B, H, T), float("inf"))}, "some token scores are infinite"),
        ({"channel": with_value(torch.ones(B, H, D), -float("inf"))}, "some channel scores are infinite"),
        ({"token": with_value(torch.ones(B, H, T), -0.25)}, "some token scores are negative (-0.25)"),
        ({"channel": with_value(torch.ones(B, H, D), -1e-30)}, "some channel scores are negative (-1e-30)"),
        ({"token": [1.0] * T}, "token scores: expected a tensor, got list"),
        ({"token": torch.ones(B, H, T, device="meta")}, "token scores are on meta, expected cpu"),
        ({"pinned": torch.zeros(B, H, T)}, "pinned is torch.float32, not torch.bool"),
        ({"pinned": torch.zeros(B, T, dtype=torch.bool)}, "pinned have shape [2, 10], expected [2, 3, 10]"),
    ],
)
def test_bad_scores(changes: dict[str, Any], message: str) -> None:
    assert error_of(check_scores, good_scores(**changes), OBSERVATION, "mine") == f"scorer 'mine', layer 7: {message}"


def test_scores_of_another_type() -> None:
    message = error_of(check_scores, (torch.ones(B, H, T), torch.ones(B, H, D)), OBSERVATION, "mine")
    assert message == "scorer 'mine', layer 7: score() returned tuple, not Scores"


def check(plan: Any, per_head: int = LADDER.full_cost, scope: Scope = "head") -> None:
    settle([examine_plan(plan, good_scores(), LADDER, Budget(per_head, H), "mine", scope, "layer 7")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_bits": torch.zeros(B, H, T + 1, dtype=torch.uint8)}, "value_bits have shape [2, 3, 11], expected"),
        ({"key_bits": torch.zeros(B, H, T, dtype=torch.uint8)}, "key_bits have shape [2, 3, 10], expected [2, 3, 32]"),
        ({"pinned": torch.zeros(B, 1, T, dtype=torch.bool)}, "pinned have shape [2, 1, 10], expected [2, 3, 10]"),
        ({"value_bits": torch.zeros(B, H, T)}, "value_bits is torch.float32, not torch.uint8"),
        ({"key_bits": torch.zeros(B, H, D, dtype=torch.int64)}, "key_bits is torch.int64, not torch.uint8"),
        ({"pinned": torch.zeros(B, H, T, dtype=torch.uint8)}, "pinned is torch.uint8, not torch.bool"),
        ({"pinned": None}, "pinned: expected a tensor, got NoneType"),
        (
            {"value_bits": torch.zeros(B, H, T, dtype=torch.uint8, device="meta")},
            "value_bits are on meta, expected cpu",
        ),
        ({"value_bits": with_value(good_plan().value_bits, 3)}, "value_bits has a width of 3 bits; the format has"),
        ({"key_bits": with_value(good_plan().key_bits, 255)}, "key_bits has a width of 255 bits; the format has"),
    ],
)
def test_bad_plan(changes: dict[str, Any], message: str) -> None:
    assert error_of(check, good_plan(**changes)).startswith(f"allocator 'mine', layer 7: {message}")


def test_plan_of_another_type() -> None:
    assert error_of(check, None) == "allocator 'mine', layer 7: allocate() returned NoneType, not BitPlan"


def test_plan_must_fit_each_head_where_heads_do_not_compete() -> None:
    cost = int(LADDER.cost(good_plan())[0, 0])
    check(good_plan(), cost)
    assert error_of(check, good_plan(), cost - 16) == (
        f"allocator 'mine', layer 7: overspends the budget of {(cost - 16) // 8} bytes a head by 2 bytes"
    )
    assert error_of(check, good_plan(), cost - 1).endswith("a head by 1 bytes")
    uneven = good_plan()
    uneven.value_bits[1, 2] = 8  # all of one head's tokens
    uneven.value_bits[1, 0] = 0  # the least of another's
    dearest = int(LADDER.cost(uneven).max())
    assert int(LADDER.cost(uneven).sum(1).max()) <= 3 * (dearest - 1)
    check(uneven, dearest)
    assert "overspends" in error_of(check, uneven, dearest - 1)
    for scope in ("layer", "model"):
        check(uneven, dearest - 1, scope)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_plan_must_fit_the_heads_together_where_they_compete(scope: Scope) -> None:
    cost = int(LADDER.cost(good_plan())[0, 0])
    check(good_plan(), cost, scope)
    message = error_of(check, good_plan(), cost - 8, scope)
    budget = 3 * (cost - 8) // 8
    assert message == f"allocator 'mine', layer 7: overspends the budget of {budget} bytes by 3 bytes"
    worse = good_plan()
    worse.value_bits[1, 0] = 16  # one sequence of the batch
    assert "overspends" in error_of(check, worse, cost, scope)


def test_plan_of_several_layers_is_charged_layer_by_layer() -> None:
    plan = good_plan()
    plan.value_bits[:, 2] = 0
    finding = examine_plan(
        plan, good_scores(), LADDER, Budget(LADDER.full_cost, H), "mine", "model", "layers 0 to 2", H
    )
    assert settle([finding])[0][3:] == LADDER.cost(plan).sum(0).tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.25])
@pytest.mark.parametrize("field", ["token", "channel"])
def test_bad_scores_are_kept_from_allocators(field: str, value: float) -> None:
    good = good_scores()
    assert defuse(good, examine_scores(good, OBSERVATION, "mine")).token.equal(good.token)
    bad = dataclasses.replace(good, **{field: with_value(getattr(good, field), value)})
    harmless = defuse(bad, examine_scores(bad, OBSERVATION, "mine"))
    assert not bool(harmless.token.any() or harmless.channel.any())


def test_device_is_not_asked_before_a_finding_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, lambda tensor, name=name: asked.append(name))
    defuse(good_scores(), examine_scores(good_scores(), OBSERVATION, "mine"))
    monkeypatch.undo()
    assert not asked


def segment_and_plan() -> tuple[WholeSegment, BitPlan]:
    whole = torch.full((1, 1, T), 16, dtype=torch.uint8)
    keys, values = torch.randn(2, 1, 1, T, D).bfloat16()
    plan = BitPlan(whole, torch.full((1, 1, D), 16, dtype=torch.uint8), torch.zeros(1, 1, T, dtype=torch.bool))
    return WholeSegment(keys.clone(), values.clone()), plan


def test_segment_within_its_ladder() -> None:
    segment, plan = segment_and_plan()
    check_segment(segment, int(LADDER.cost(plan).sum()), "mine", 7)


def test_segment_that_holds_more_than_its_ladder_promised() -> None:
    segment, plan = segment_and_plan()
    fat = WholeSegment(torch.cat([segment.keys, segment.keys])[:1], segment.values)  # a view keeps all of its storage
    message = error_of(check_segment, fat, int(LADDER.cost(plan).sum()), "mine", 7)
    promised = 2 * T * D * 2
    assert message == f"format 'mine', layer 7: holds {promised * 3 // 2} bytes, its ladder promised {promised}"


def test_segment_of_another_type() -> None:
    plan = segment_and_plan()[1]
    message = error_of(check_segment, plan, 0, "mine", 7)
    assert message == "format 'mine', layer 7: pack() returned BitPlan"


class SharedSegment(WholeSegment):
    """Names each of its tensors twice, the second time as a view."""

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.keys, self.values, self.keys[..., :1], self.values[:, :, 2:])


def test_bytes_of_a_storage_are_counted_once() -> None:
    segment, _ = segment_and_plan()
    assert SharedSegment(segment.keys, segment.values).nbytes == segment.nbytes == 2 * T * D * 2


@pytest.mark.parametrize("kind", [ConfigError, BudgetError, PluginError])
def test_blame_keeps_the_kind_of_our_errors(kind: type[Exception]) -> None:
    with (
        pytest.raises(kind, match=re.escape("scorer 'mine', layer 3: too bad")) as error,
        blame("scorer 'mine'", "layer 3"),
    ):
        raise kind("too bad")
    assert type(error.value) is kind


def test_blame_turns_other_errors_into_one_line() -> None:
    with pytest.raises(PluginError) as error, blame("scorer 'mine'", "layer 3"):
        raise ValueError("first\nsecond")
    assert str(error.value).startswith("scorer 'mine', layer 3: ")
    assert "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, ValueError)


def test_blame_passes_on_what_is_not_the_plugin_s_fault() -> None:
    with pytest.raises(torch.OutOfMemoryError), blame("scorer 'mine'", "layer 3"):
        raise torch.OutOfMemoryError("no memory")
    with pytest.raises(KeyboardInterrupt), blame("scorer 'mine'", "layer 3"):
        raise KeyboardInterrupt
