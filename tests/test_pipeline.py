"""The pipeline waits for the device once a layer, when the packed sizes are read."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from rdkv import CompressionConfig
from rdkv.runtime.observation import Observation
from rdkv.runtime.pipeline import Pipeline

# Operations whose result the host reads, or whose size depends on data.
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_unique2", "aten::masked_select"}
HEADS, GROUP, TOKENS, DIM = 2, 4, 512, 64


class Operations(TorchDispatchMode):
    """Counts what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_scoring_and_allocating_read_nothing() -> None:
    config = LlamaConfig(num_hidden_layers=2, hidden_size=512, num_attention_heads=8, num_key_value_heads=2)
    pipeline = Pipeline(config, CompressionConfig(budget=0.1, calibration="none"))
    for seen_before in (False, True):  # tables are made, and sent to the device, the first time
        keys, values = torch.randn(2, 1, HEADS, TOKENS, DIM).bfloat16()
        queries = torch.randn(1, HEADS * GROUP, TOKENS, DIM).bfloat16()
        with Operations() as operations:
            pending = pipeline.score(Observation(keys, values, queries, DIM**-0.5, 0))
            (planned,) = pipeline.allocate([pending])
        if seen_before:
            assert not READS & set(operations.counts)
            assert sum(operations.counts.values()) < 400
    assert pipeline.pack(pending, planned).nbytes * 8 <= planned.bits
