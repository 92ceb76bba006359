"""The pipeline waits for the device once a layer, when the layer is finished."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import written
from packs import DEVICE
from problems import same
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from waits import Waits

from rdkv import CompressionConfig
from rdkv.runtime.budget import head_weights, layer_shares
from rdkv.runtime.checks import examine_scores
from rdkv.runtime.observation import Observation
from rdkv.runtime.pipeline import Pipeline
from rdkv.runtime.plan import Scores

# Operations whose result the host reads, or whose size depends on data.
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_unique2", "aten::masked_select"}
NO_LAUNCH = {"aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided"}
MOST_LAUNCHES = 70  # of a layer's checks and allocation, sorts counted as one
HEADS, GROUP, TOKENS, DIM = 2, 4, 512, 64


class Operations(TorchDispatchMode):
    """Counts what is called, and apart what a device is given to do: operations that are no views, and kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.within = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        self.counts[name] += 1
        if not (self.within or func.is_view or name in NO_LAUNCH):
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))

    def kernel(self, launch: Any) -> Any:
        """``launch`` of a kernel in Triton's interpreter, counted as one."""

        def run(grid: Any, *args: Any, **kwargs: Any) -> None:
            self.launches[grid.fn.__name__] += 1
            self.within = True
            launch(grid, *args, **kwargs)
            self.within = False

        return run


def make_pipeline(first_head: int = 0, **settings: Any) -> Pipeline:
    config = LlamaConfig(num_hidden_layers=2, hidden_size=512, num_attention_heads=8, num_key_value_heads=2)
    return Pipeline(config, CompressionConfig(budget=0.1, **{"calibration": "none", **settings}), first_head)


def observe(tokens: int = TOKENS, device: str = "cpu") -> Observation:
    keys, values = torch.randn(2, 1, HEADS, tokens, DIM, device=device).bfloat16()
    queries = torch.randn(1, HEADS * GROUP, tokens, DIM, device=device).bfloat16()
    return Observation(keys, values, queries, DIM**-0.5, 0)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts in Triton's interpreter")
def test_few_launches_with_kernels_and_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    pipeline = make_pipeline()
    pending = pipeline.score(observe())
    (expected,) = pipeline.allocate([pending])
    monkeypatch.setattr("rdkv.kernels.available.triton_takes", lambda _: True)
    with Operations() as operations:
        launch = operations.kernel(interpreter.GridExecutor.__call__)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
        finding = examine_scores(pending.scores, observe(), "mine")
        (planned,) = pipeline.allocate([replace(pending, finding=finding)])
    assert operations.launches.total() <= MOST_LAUNCHES, operations.launches
    assert same(planned.plan, expected.plan)
    assert planned.bits == expected.bits


ONE_MEAN = {"scorer_options": {"kernel": "mean", "leverage": 0.0}, "allocator_options": {"key_weight": 1.0}}
ATTENTION = {"scorer_options": {"leverage": 0.0}}


# The default has three means, and leverage, which on a GPU has four launches.
@pytest.mark.parametrize(("settings", "most"), [(ONE_MEAN, 380), (ATTENTION, 400), ({}, 440)])
def test_scoring_and_allocating_read_nothing(settings: dict[str, Any], most: int) -> None:
    pipeline = make_pipeline(**settings)
    for seen_before in (False, True):  # tables are made, and sent to the device, the first time
        with Operations() as operations:
            pending = pipeline.score(observe())
            (planned,) = pipeline.allocate([pending])
        if seen_before:
            assert not READS & set(operations.counts)
            assert sum(operations.counts.values()) < most
    assert pipeline.begin(pending, planned)().nbytes * 8 <= planned.bits


def test_a_layer_is_waited_for_when_it_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the Triton packers, and what is sent to the host arrives when it is read."""
    kernels = pytest.importorskip("rdkv.kernels.pack")
    pipeline, layer = make_pipeline(), observe(100, DEVICE)
    (planned,) = pipeline.allocate([pipeline.score(layer)])
    expected = pipeline.begin(pipeline.score(layer), planned)()
    monkeypatch.setattr("rdkv.plugins.rdkv.pack.triton_takes", lambda _: True)
    waits = Waits(monkeypatch, "rdkv.kernels.pack", "rdkv.runtime.findings")
    for kernel in ("_measure", "_write"):
        monkeypatch.setattr(kernels, kernel, waits.unseen(getattr(kernels, kernel)))
    pending = pipeline.score(layer)
    (planned,) = pipeline.allocate([pending])
    finish = pipeline.begin(pending, planned)
    assert not waits.seen
    segment = finish()
    assert waits.seen == ["readback", "readback"]  # counts, and the figures of scores and plan
    monkeypatch.undo()
    assert all(map(torch.equal, segment.tensors(), expected.tensors()))


def test_a_budget_that_may_hold_a_layer_is_decided_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make_pipeline()
    pipeline.config = CompressionConfig(budget=1.0, calibration="none")
    pending = pipeline.score(observe())
    waits = Waits(monkeypatch, "rdkv.runtime.findings")
    (planned,) = pipeline.allocate([pending])
    assert planned.whole
    assert waits.seen[0] == "readback"


def calibrated(tmp_path: Path, layers: tuple[float, ...], first_head: int = 0, **settings: Any) -> Pipeline:
    """Of layers with these losses, the last quarter of which is that of the second head."""
    heads = tuple((0.75 * loss, 0.25 * loss) for loss in layers)
    return make_pipeline(first_head, calibration=written(tmp_path / "calibration.json", heads=heads), **settings)


@pytest.mark.parametrize("allocator", ["waterfill", "eviction"])
def test_a_layer_has_the_bytes_that_its_loss_earns(tmp_path: Path, allocator: str) -> None:
    pipeline = calibrated(tmp_path, (0.1, 0.9), allocator=allocator)
    even = calibrated(tmp_path, (0.1, 0.9), allocator=allocator, budget_by="even")
    full = HEADS * 2 * DIM * 16 * TOKENS
    spent = []
    for layer, share in enumerate(layer_shares((0.1, 0.9))):
        seen = replace(observe(), layer=layer)
        (planned,) = pipeline.allocate([pipeline.score(seen)])
        spent.append(planned.bits)
        assert 0.95 * share < planned.bits / (0.1 * full) <= share
        (planned,) = even.allocate([even.score(seen)])
        assert 0.95 < planned.bits / (0.1 * full) <= 1.0
    assert sum(spent) <= 2 * 0.1 * full
    assert even.shares == make_pipeline().shares == (1.0, 1.0)


@pytest.mark.parametrize(
    ("allocator", "options", "even"),
    [
        ("quantization", {}, True),
        ("waterfill", {"ladder": (2, 4, 8)}, True),
        ("waterfill", {"ladder": (0, 4)}, False),
        ("eviction", {}, False),
    ],
)
def test_layers_that_keep_every_token_share_evenly(
    tmp_path: Path, allocator: str, options: dict[str, Any], even: bool
) -> None:
    pipeline = calibrated(tmp_path, (0.01, 0.99), allocator=allocator, allocator_options=options)
    assert (pipeline.shares == (1.0, 1.0)) is even


def test_heads_compete_with_what_they_lose(tmp_path: Path) -> None:
    by_head, by_layer = (calibrated(tmp_path, (0.1, 0.9), budget_by=by) for by in ("head", "layer"))
    assert by_head.shares == by_layer.shares
    pending = by_head.score(observe())
    (planned,), (plain,) = (pipeline.allocate([pending]) for pipeline in (by_head, by_layer))
    scores, (first, second) = pending.scores, head_weights((0.75, 0.25))
    weight = torch.tensor([first, second], device=DEVICE)[None, :, None]
    pending.scores = Scores(scores.token * weight, scores.channel * weight, scores.pinned)
    (expected,) = by_layer.allocate([pending])
    same(planned.plan, expected.plan)
    (fewer, more), (before, _) = (plan.kept.sum((0, 2)).tolist() for plan in (planned.plan, plain.plan))
    assert fewer > before
    assert more < fewer


def test_a_rank_has_the_weights_of_its_own_heads(tmp_path: Path) -> None:
    """One head of two, which then has no other to compete with: the second's weight, alone, changes nothing."""
    seen = observe()
    own = Observation(seen.keys[:, 1:], seen.values[:, 1:], seen.queries[:, GROUP:], seen.scale, 0)
    rank, even = calibrated(tmp_path, (0.5, 0.5), first_head=1), make_pipeline()
    (planned,), (expected,) = (pipeline.allocate([pipeline.score(own)]) for pipeline in (rank, even))
    same(planned.plan, expected.plan)
    assert rank._weighed(rank.score(own)).token.max() < even.score(own).scores.token.max()


def test_heads_of_all_layers_share_what_is_for_all(tmp_path: Path) -> None:
    """Where layers compete, what a layer's loss earns it is for them to find out."""
    pipeline = calibrated(tmp_path, (0.1, 0.9), allocator_options={"scope": "model"})
    layers = [pipeline.score(replace(observe(), layer=layer)) for layer in range(2)]
    plans = pipeline.allocate(layers)
    budget = 2 * 0.1 * HEADS * 2 * DIM * 16 * TOKENS
    assert 0.95 * budget < sum(planned.bits for planned in plans) <= budget
