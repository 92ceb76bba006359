"""Which models' layers are known, and that fusing their products leaves the models as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rdkv.runtime.engine.decoder import fuse, known_decoder

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"]
IDS = torch.randint(3, 259, (2, 20), generator=torch.Generator().manual_seed(0))


def held(model: Any) -> int:
    """Bytes of the storages behind a model's parameters."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_known_models_work_as_before_in_the_same_memory(family: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        before, bytes_before = model(IDS).logits, held(model)
        decoder = known_decoder(model)
        assert decoder is not None
        assert torch.equal(model(IDS).logits, before)
    assert held(model) == bytes_before
    again = known_decoder(model)
    assert again is not None
    for mine, first in zip(again.layers, decoder.layers, strict=True):
        assert mine.qkv.weight.data_ptr() == first.qkv.weight.data_ptr()
        assert mine.gate_up.weight.shape == first.gate_up.weight.shape
    assert held(model) == bytes_before


def test_fused_product_is_the_products_side_by_side() -> None:
    parts = [nn.Linear(8, n) for n in (6, 2, 3)]
    x = torch.randn(4, 8)
    expected = torch.cat([part(x) for part in parts], -1)
    fused = fuse(parts)
    torch.testing.assert_close(fused(x), expected)
    assert fuse(parts).weight.data_ptr() == fused.weight.data_ptr()
    with torch.no_grad():
        parts[1].weight.zero_()  # a change of the module is one of the fused product
    assert not fused.weight[6:8].any()
    assert fuse([nn.Linear(8, 2, bias=False)]).bias is None


def other_linear(model: Any) -> None:
    class Quantized(nn.Linear):
        """As quantisation libraries put in a linear module's place."""

    model.model.layers[1].mlp.up_proj = Quantized(64, 96, bias=False)


def one_more_norm(model: Any) -> None:
    model.model.layers[1].pre_feedforward_layernorm = nn.Identity()


def other_norm(model: Any) -> None:
    model.model.norm = nn.LayerNorm(64)


def half_of_the_biases(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj = nn.Linear(64, 64, bias=True)


def two_types(model: Any) -> None:
    model.lm_head.to(torch.float64)


def other_activation(model: Any) -> None:
    model.config.hidden_act = "gelu"


def other_family(model: Any) -> None:
    model.config.model_type = "gemma"


@pytest.mark.parametrize(
    "change",
    [other_linear, one_more_norm, other_norm, half_of_the_biases, two_types, other_activation, other_family],
    ids=lambda change: change.__name__,
)
def test_what_is_not_known(change: Callable[[Any], None], tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    change(model)
    weight = model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    assert known_decoder(model) is None
    assert model.model.layers[0].self_attn.q_proj.weight.data_ptr() == weight  # nothing was fused


def test_rotary_embedding_that_changes_with_the_length(tiny_model: Callable[..., Any]) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    for model, static in ((tiny_model("llama"), True), (tiny_model("llama", rope_parameters=rope), False)):
        decoder = known_decoder(model)
        assert decoder is not None
        assert decoder.static_rotary == static
