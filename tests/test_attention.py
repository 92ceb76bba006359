"""An attached model with any other cache is the model with sdpa; masks and what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import DIM, GROUPS, HEADS, Attention, forward, new_cache, padding, prefill, random_qkv
from torch import Tensor
from transformers import DynamicCache

import rdkv
from rdkv.runtime.attention import NAME, attention_forward, causal_mask, padding_mask
from rdkv.runtime.errors import UnsupportedModelError

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"]
IDS = torch.randint(3, 259, (3, 40), generator=torch.Generator().manual_seed(0))
MASK = padding([40, 33, 20]).long()


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def detached(model: Any) -> Any:
    yield
    rdkv.detach(model)


def both(model: Any, call: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
    """What a call gives with the model as it is, and attached."""
    rdkv.detach(model)
    with torch.no_grad():
        return call(model), call(rdkv.attach(model))


def logits(mask: Tensor | None = None, cache: bool = True, **more: Any) -> Callable[[Any], Any]:
    """Logits of two passes: ids but the last three, then those."""

    def call(model: Any) -> Any:
        if not cache:
            return model(IDS, attention_mask=mask, use_cache=False, **more).logits
        kept = DynamicCache()
        short = None if mask is None else mask[:, :-3]
        first = model(IDS[:, :-3], attention_mask=short, past_key_values=kept).logits
        return torch.cat([first, model(IDS[:, -3:], attention_mask=mask, past_key_values=kept).logits], 1)

    return call


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_other_caches_work_as_with_sdpa(
    family: str, dtype: torch.dtype, cache: bool, mask: Tensor | None, tiny_model: Callable[..., Any]
) -> None:
    plain, attached = both(tiny_model(family, dtype), logits(mask, cache))
    real = torch.ones(IDS.shape, dtype=torch.bool) if mask is None else mask.bool()
    assert torch.equal(plain[real], attached[real])


@pytest.mark.parametrize("more", [{}, {"attention_mask": MASK}, {"do_sample": True, "attention_mask": MASK}])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates_as_with_sdpa(model: Any, cache: str, more: dict[str, Any]) -> None:
    def call(model: Any) -> Any:
        torch.manual_seed(0)
        settings = {"do_sample": False, "max_new_tokens": 12, "cache_implementation": cache} | more
        return model.generate(IDS, **settings)

    plain, attached = both(model, call)
    assert torch.equal(plain, attached)


def test_packed_sequences_stay_apart(model: Any) -> None:
    # Without a cache, positions that start anew are how sequences in one row are told apart.
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None].expand(3, -1)
    plain, attached = both(model, logits(cache=False, position_ids=positions))
    assert torch.equal(plain, attached)
    with torch.no_grad():
        alone = model(IDS[:, 25:], use_cache=False).logits
    torch.testing.assert_close(attached[:, 25:], alone)


def test_mask_of_four_dimensions(model: Any) -> None:
    mask = torch.ones(3, 1, 40, 40, dtype=torch.bool).tril()
    mask[..., 5] = False
    mask[..., 5, 5] = True
    plain, attached = both(model, logits(mask, cache=False))
    assert torch.equal(plain, attached)
    cache = rdkv.CompressedCache(rdkv.attach(model).config, rdkv.CompressionConfig(budget=0.3))
    with pytest.raises(UnsupportedModelError, match="2D attention mask"):
        model(IDS, attention_mask=mask, past_key_values=cache)


def test_gradients_pass_as_with_sdpa(model: Any) -> None:
    grads = []
    for each in (rdkv.detach, rdkv.attach):
        each(model)
        model.zero_grad()
        logits = model(IDS, attention_mask=MASK, use_cache=False).logits
        logits[MASK.bool()].logsumexp(-1).mean().backward()  # padding has logits too, which differ
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    for plain, attached in zip(*grads, strict=True):
        torch.testing.assert_close(plain, attached)


def test_attach_and_detach(model: Any) -> None:
    attached: Any = rdkv.attach(model)
    assert attached is model
    assert model.config._attn_implementation == NAME
    rdkv.attach(model)
    detached: Any = rdkv.detach(model)
    assert detached is model
    assert model.config._attn_implementation == "sdpa"
    assert getattr(model, "_supported_generation_modes", None) is None
    rdkv.detach(model)
    assert model.config._attn_implementation == "sdpa"
    assert model.generate(IDS, num_beams=2, max_new_tokens=2, do_sample=False).shape == (3, 42)


def test_detach_restores_what_was_there(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    rdkv.attach(rdkv.attach(model))
    rdkv.detach(model)
    assert model.config._attn_implementation == "eager"


def test_another_attention_chosen_by_hand(model: Any) -> None:
    rdkv.attach(model)
    model.set_attn_implementation("sdpa")
    rdkv.detach(model)
    assert model.generate(IDS, num_beams=2, max_new_tokens=2, do_sample=False).shape == (3, 42)


def test_one_model_attached_does_not_attach_another(tiny_model: Callable[..., Any], model: Any) -> None:
    other = tiny_model("llama", seed=1)
    rdkv.attach(model)
    assert other.config._attn_implementation == "sdpa"
    assert other.generate(IDS, num_beams=2, max_new_tokens=2, do_sample=False).shape == (3, 42)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "sliding_window"])
def test_attention_of_another_kind_is_refused(name: str) -> None:
    query, keys, values = random_qkv(1, 4)
    asked: dict[str, Any] = {name: 1.0}
    with pytest.raises(UnsupportedModelError, match=f"Attention asks for '{name}'"):
        attention_forward(Attention(), query, keys, values, None, **asked)
    asked[name] = None
    attention_forward(Attention(), query, keys, values, None, **asked)


def test_scale_of_the_module_counts() -> None:
    query, keys, values = random_qkv(1, 60)
    outputs = {}
    for scale in (None, DIM**-0.5, 0.01):
        cache = new_cache(1.0)
        keys_, values_ = cache.update(keys, values, 0)
        outputs[scale] = attention_forward(Attention(), query, keys_, values_, None, scaling=scale)[0]
    assert torch.equal(outputs[None], outputs[DIM**-0.5])
    assert not torch.allclose(outputs[None], outputs[0.01])


def test_causal_mask() -> None:
    cpu = torch.device("cpu")
    assert causal_mask(2, 4, None, cpu)[0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    padded = causal_mask(3, 3, torch.tensor([[False, True, True], [True, True, True]]), cpu)
    assert padded[:, 0].int().tolist() == [[[1, 0, 0], [0, 1, 0], [0, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]]


def test_padding_mask_is_small() -> None:
    assert padding_mask(2, 6, 6) is None
    assert padding_mask(2, 6, 6, attention_mask=torch.ones(2, 6).bool()) is None
    mask = padding([6, 4])
    found = padding_mask(2, 6, 6, attention_mask=mask)
    assert found is not None
    assert torch.equal(found, mask)
    step = padding_mask(2, 1, 6, q_offset=5, attention_mask=mask)
    assert step is not None
    assert torch.equal(step, mask)


def test_key_that_a_cache_returns_leads_to_it_alone() -> None:
    query, keys, values = random_qkv(2, 60)
    first, second = new_cache(0.3), new_cache(1.0)
    outputs = [forward(cache, 0, (query, keys, values)) for cache in (first, second)]
    assert first.session.prompt_lengths == second.session.prompt_lengths == [60, 60]
    assert torch.equal(*outputs)
    plain, _ = attention_forward(Attention(), query, keys, values, None, scaling=DIM**-0.5)
    assert torch.equal(plain, outputs[0])
    assert plain.shape == (2, 60, HEADS * GROUPS, DIM)
    assert len(prefill(new_cache(), (query, keys, values))) == 2
