"""What heads cost, against the same by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rdkv
from rdkv.runtime import sensitivity as module
from rdkv.runtime.attention import attach
from rdkv.runtime.calibration import python_reference
from rdkv.runtime.errors import ConfigError
from rdkv.runtime.loading import LoadedModel, load_model
from rdkv.runtime.pipeline import Pending, Pipeline, Planned
from rdkv.runtime.plan import BitPlan
from rdkv.runtime.sensitivity import ANSWER, BUDGET, CUE, sensitivity

TOKENS = 8 * CUE + 2 * ANSWER


@pytest.fixture
def loaded(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder), "cpu")


def test_shares_of_the_heads(loaded: LoadedModel) -> None:
    config = loaded.model.config
    shares = torch.tensor(sensitivity(loaded, python_reference(), TOKENS, prompts=2))
    assert shares.shape == (config.num_hidden_layers, config.num_key_value_heads)
    assert float(shares.sum()) == pytest.approx(1.0)
    assert float(shares.min()) > 0


def test_a_head_that_adds_nothing_costs_nothing(loaded: LoadedModel) -> None:
    config, layer = loaded.model.config, loaded.model.model.layers[1].self_attn
    width = layer.o_proj.in_features // config.num_key_value_heads  # of the query heads that read one KV head
    with torch.no_grad():
        layer.o_proj.weight[:, width : 2 * width] = 0
    shares = torch.tensor(sensitivity(loaded, python_reference(), TOKENS, prompts=1))
    assert float(shares[1, 1]) < 1e-6
    shares[1, 1] = 1.0
    assert float(shares.min()) > 1e-5


def only(monkeypatch: pytest.MonkeyPatch, layer: int, head: int) -> None:
    """Let plans keep everything but in one head, whatever that takes."""
    allocate = Pipeline.allocate

    def cut(self: Pipeline, pending: list[Pending]) -> list[Planned]:
        (planned,) = allocate(self, pending)
        plan = BitPlan.uniform(pending[0].keys.shape, 16, pending[0].keys.device)
        if pending[0].layer == layer:
            plan.value_bits[:, head] = planned.plan.value_bits[:, head]
            plan.key_bits[:, head] = planned.plan.key_bits[:, head]
            plan.pinned[:, head] = planned.plan.pinned[:, head]
        return [replace(planned, plan=plan)]

    monkeypatch.setattr(Pipeline, "allocate", cut)
    monkeypatch.setattr("rdkv.runtime.pipeline.check_segment", lambda *_: None)


def test_the_loss_of_one_head_is_that_of_a_cache_with_the_others_whole(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = attach(loaded.model), torch.randint(3, 250, (TOKENS,))
    found = module._losses(model, ids)
    recording, answer = rdkv.Recording(model.config), ids[None, -ANSWER:]
    with torch.inference_mode():
        model(ids[None, :-ANSWER], past_key_values=recording, use_cache=True)
        truth = model(answer, past_key_values=recording.full()).logits.log_softmax(-1)
        for layer, head in ((0, 0), (0, 1), (1, 1)):
            with monkeypatch.context() as patch:
                only(patch, layer, head)
                cache = recording.compress(rdkv.CompressionConfig(budget=BUDGET, calibration="none"))
            got = model(answer, past_key_values=cache).logits.log_softmax(-1)
            loss = torch.nn.functional.kl_div(got, truth, reduction="none", log_target=True).sum(-1).mean()
            assert float(found[layer, head]) == pytest.approx(float(loss), rel=1e-3)


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
