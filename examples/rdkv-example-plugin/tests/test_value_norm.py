"""Run with ``pytest`` in this folder, rdkv and the plugin installed."""

import torch
from rdkv_example_plugin.value_norm import ValueNorm, ValueNormOptions

from rdkv import Observation


def test_large_values_rank_first() -> None:
    keys, values = torch.randn(1, 2, 10, 4), torch.ones(1, 2, 10, 4)
    values[..., 3, :] = 5.0
    layer = Observation(keys=keys, values=values, queries=torch.randn(1, 4, 10, 4), scale=0.5, layer=0)
    scores = ValueNorm(ValueNormOptions(recent=0)).score(layer)
    assert scores.token.argmax(-1).tolist() == [[3, 3]]
    assert scores.channel.shape == (1, 2, 4)
