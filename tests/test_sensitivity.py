"""What layers cost, against the same by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import rdkv
from rdkv.runtime import sensitivity as module
from rdkv.runtime.attention import attach
from rdkv.runtime.budget import layer_bits
from rdkv.runtime.calibration import python_reference
from rdkv.runtime.errors import ConfigError
from rdkv.runtime.loading import LoadedModel, load_model
from rdkv.runtime.sensitivity import ANSWER, BUDGET, CUE, sensitivity

TOKENS = 8 * CUE + 2 * ANSWER


@pytest.fixture
def loaded(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder), "cpu")


def test_shares_of_the_layers(loaded: LoadedModel) -> None:
    shares = sensitivity(loaded, python_reference(), TOKENS, prompts=2)
    assert len(shares) == loaded.model.config.num_hidden_layers
    assert sum(shares) == pytest.approx(1.0)
    assert min(shares) > 0


def test_a_layer_that_adds_nothing_costs_nothing(loaded: LoadedModel) -> None:
    layer = loaded.model.model.layers[1].self_attn
    with torch.no_grad():
        layer.o_proj.weight.zero_()
    first, second = sensitivity(loaded, python_reference(), TOKENS, prompts=1)
    assert first == pytest.approx(1.0)
    assert second < 1e-6


def one_compressed(layer: int, config: rdkv.CompressionConfig, *sizes: Any) -> list[int]:
    """Bits of a head of each of two layers: those of `BUDGET`, and for the other one all."""
    budgets = (BUDGET, 1.0) if layer == 0 else (1.0, BUDGET)
    return [layer_bits(rdkv.CompressionConfig(budget=budget), *sizes)[0] for budget in budgets]


def test_the_loss_of_one_layer_is_that_of_a_cache_with_the_others_whole(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = attach(loaded.model), torch.randint(3, 250, (TOKENS,))
    found = module._losses(model, ids)
    recording, answer = rdkv.Recording(model.config), ids[None, -ANSWER:]
    with torch.inference_mode():
        model(ids[None, :-ANSWER], past_key_values=recording, use_cache=True)
        truth = model(answer, past_key_values=recording.full()).logits.log_softmax(-1)
        for layer in range(2):
            monkeypatch.setattr("rdkv.runtime.pipeline.layer_bits", partial(one_compressed, layer))
            cache = recording.compress(rdkv.CompressionConfig(budget=(1 + BUDGET) / 2, calibration="none"))
            got = model(answer, past_key_values=cache).logits.log_softmax(-1)
            loss = torch.nn.functional.kl_div(got, truth, reduction="none", log_target=True).sum(-1).mean()
            assert float(found[layer]) == pytest.approx(float(loss), rel=1e-3)


def test_prompts_go_on_and_come_back_to_earlier_passages(loaded: LoadedModel) -> None:
    ids = torch.arange(TOKENS)
    assert torch.equal(module._prompt(ids, 0, 6, loaded.tokenizer), ids)
    starts = []
    for index in (1, 4):
        again = module._prompt(ids, index, 6, loaded.tokenizer)
        assert len(again) == TOKENS
        passage = again[-CUE - ANSWER :]
        starts.append(int(passage[0]))
        assert torch.equal(passage, torch.arange(starts[-1], starts[-1] + CUE + ANSWER))
        assert passage[-1] < TOKENS - CUE - ANSWER  # all of it was read before
    assert starts == sorted(set(starts))


@pytest.mark.parametrize(("tokens", "facts"), [(3 * TOKENS, module.FACTS), (TOKENS, 6)])
def test_prompts_ask_for_facts_that_stand_in_the_text(loaded: LoadedModel, tokens: int, facts: int) -> None:
    made = module._prompt(torch.full((tokens,), 3), 2, 3, loaded.tokenizer)
    assert len(made) == tokens
    text = loaded.tokenizer.decode(made[: -CUE - ANSWER])
    asked = loaded.tokenizer.decode(made[-CUE - ANSWER :]).splitlines()[1:-1]
    told = [line.split(chr(0))[0] for line in text.splitlines()]
    assert len(asked) >= 2
    assert all(any(line.startswith(fact) for line in told) for fact in asked)
    assert len([line for line in told if line.startswith("The code of item")]) == facts


def test_short_texts(loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="the text has 3 tokens"):
        sensitivity(loaded, "abc", TOKENS)
    with pytest.raises(ConfigError, match="prompts of 100, at least 384"):
        sensitivity(loaded, python_reference(), 100)
