"""Models and ways to generate that a compressed cache cannot serve are refused before the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
    SmolLM3Config,
    T5Config,
)

import rdkv
from rdkv.runtime.errors import UnsupportedModelError
from rdkv.runtime.support import check_supported, check_window

PROMPT = torch.arange(3, 43)[None]
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
SLIDING_QWEN: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}


def llama(**more: Any) -> LlamaConfig:
    """A configuration with fields of later models."""
    return LlamaConfig(**more)


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    return rdkv.attach(tiny_model("llama"))


def cache_for(model: Any, budget: float = 0.3) -> rdkv.CompressedCache:
    return rdkv.CompressedCache(model.config, rdkv.CompressionConfig(budget=budget))


@contextmanager
def at_work(model: Any) -> Iterator[list[int]]:
    """Layers of the model that finish meanwhile."""
    done: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_, index=index: done.append(index))
        for index, layer in enumerate(model.model.layers)
    ]
    yield done
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MistralConfig(), ["mistral", "sliding-window", "4096", "config.sliding_window = None"]),
        (Phi3Config(sliding_window=2047), ["phi3", "2047", "config.sliding_window = None"]),
        (Qwen2Config(**SLIDING_QWEN), ["qwen2", "sliding-window", "16", "layer_types"]),
        (Gemma2Config(), ["gemma2", "sliding-window"]),
        (Gemma3TextConfig(), ["gemma3_text", "sliding-window"]),
        (T5Config(), ["t5", "encoder-decoder", "decoder-only"]),
        (Llama4TextConfig(), ["llama4_text", "chunked_attention"]),
        (MambaConfig(), ["mamba", "linear_attention"]),
        (Qwen3NextConfig(), ["qwen3_next", "linear_attention"]),
        (llama(attention_chunk_size=128), ["llama", "chunked"]),
        (llama(attn_logit_softcapping=50.0), ["llama", "soft-caps"]),
        (llama(num_kv_shared_layers=2), ["llama", "shares"]),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else "",
)
def test_configurations_that_are_refused(config: Any, words: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        rdkv.CompressedCache(config, rdkv.CompressionConfig(budget=0.3))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "config", [LlamaConfig(), MistralConfig(sliding_window=None), Qwen2Config(), Phi3Config(), SmolLM3Config()]
)
def test_configurations_that_are_taken(config: Any) -> None:
    check_supported(config)


def test_no_remedy_is_promised_where_it_would_change_the_model() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        check_supported(Gemma3TextConfig())
    assert "sliding_window = None" not in str(error.value)


@pytest.mark.parametrize(
    ("config_class", "model_class", "changes"),
    [(MistralConfig, MistralForCausalLM, {}), (Qwen2Config, Qwen2ForCausalLM, SLIDING_QWEN)],
)
def test_remedy_for_sliding_windows_works(config_class: Any, model_class: Any, changes: dict[str, Any]) -> None:
    config = config_class(**SMALL, **changes)
    with pytest.raises(UnsupportedModelError) as error:
        check_supported(config)
    config.sliding_window = None
    if "config.layer_types" in str(error.value):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    model: Any = rdkv.attach(model_class(config).eval())
    out = model.generate(PROMPT, past_key_values=cache_for(model, 1.0), max_new_tokens=6, do_sample=False)
    assert torch.equal(out, model.generate(PROMPT, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("config_class", [MistralConfig, Qwen2Config])
def test_attach_refuses_before_it_changes_anything(config_class: Any) -> None:
    changes = SLIDING_QWEN if config_class is Qwen2Config else {}
    model_class = Qwen2ForCausalLM if config_class is Qwen2Config else MistralForCausalLM
    model = model_class(config_class(**SMALL, **changes))
    with pytest.raises(UnsupportedModelError, match="sliding-window"):
        rdkv.attach(model)
    assert model.config._attn_implementation == "sdpa"


def test_window_names_both_lengths() -> None:
    config = LlamaConfig(max_position_embeddings=512)
    check_window(config, 512)
    with pytest.raises(UnsupportedModelError, match=r"513 .* 512"):
        check_window(config, 513)
    check_window(SimpleNamespace(), 10**9)


def test_window_of_a_model(model: Any) -> None:
    long = torch.arange(513).remainder(200)[None] + 3
    with at_work(model) as done:
        with pytest.raises(UnsupportedModelError, match=r"513 .* 512"):
            model.generate(long, past_key_values=cache_for(model), max_new_tokens=2)
        assert not done
        cache = cache_for(model)
        model.generate(long[:, 1:], past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert done
    assert cache.retention <= 0.3


def test_padding_does_not_count_as_window(model: Any) -> None:
    ids = torch.full((2, 600), 7)
    mask = torch.arange(600) >= torch.tensor([100, 580])[:, None]
    with torch.no_grad():
        model(ids, attention_mask=mask.long(), past_key_values=cache_for(model))


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ({"num_beams": 2}, "BEAM_SEARCH"),
        ({"num_beams": 2, "do_sample": True}, "BEAM_SAMPLE"),
        ({"prompt_lookup_num_tokens": 2}, "ASSISTED_GENERATION"),
        ({"assistant_early_exit": 1}, "ASSISTED_GENERATION"),
        ({"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True}, "CONTRASTIVE_SEARCH"),
        ({"dola_layers": "low", "trust_remote_code": True}, "DOLA_GENERATION"),
    ],
)
def test_ways_to_generate_that_are_refused(model: Any, mode: dict[str, Any], name: str) -> None:
    ran: list[int] = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=name) as error:
        model.generate(PROMPT, past_key_values=cache_for(model), max_new_tokens=4, **mode)
    for word in ("greedy search and sampling", "rdkv is attached", "rdkv.detach(model)"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert not ran


def test_assistant_model_is_refused(model: Any, tiny_model: Callable[..., Any]) -> None:
    ran: list[int] = []
    assistant = tiny_model("llama", seed=1)
    for each in (model, assistant):
        each.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=r"ASSISTED_GENERATION"):
        model.generate(PROMPT, past_key_values=cache_for(model), assistant_model=assistant, max_new_tokens=4)
    assert not ran


def test_detached_model_generates_as_it_likes(model: Any) -> None:
    rdkv.detach(model)
    assert model.generate(PROMPT, num_beams=2, max_new_tokens=3, do_sample=False).shape == (1, 43)
    assert model.generate(PROMPT, prompt_lookup_num_tokens=2, max_new_tokens=3, do_sample=False).shape == (1, 43)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}])
def test_detached_model_with_a_compressed_cache(model: Any, mode: dict[str, Any]) -> None:
    cache = cache_for(model)
    rdkv.detach(model)
    with at_work(model) as done, pytest.raises(UnsupportedModelError, match=r"'sdpa'.*rdkv\.attach\(model\)"):
        model.generate(PROMPT, past_key_values=cache, max_new_tokens=4, **mode)
    assert not done
    assert cache.nbytes == 0


def test_detached_model_with_assisted_decoding(model: Any) -> None:
    cache = cache_for(model)
    rdkv.detach(model)
    with pytest.raises(UnsupportedModelError, match=r"assisted decoding.*greedy search or sampling"):
        model.generate(PROMPT, past_key_values=cache, max_new_tokens=4, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([0])), "beam search"),
        (lambda cache: cache.crop(-1), "cropping"),
        (lambda cache: cache.batch_repeat_interleave(2), "repeating"),
        (lambda cache: cache.batch_select_indices(torch.tensor([0])), "selecting"),
    ],
)
def test_changes_of_a_filled_cache_are_refused(model: Any, call: Callable[[Any], None], what: str) -> None:
    cache = cache_for(model)
    model.generate(PROMPT, past_key_values=cache, max_new_tokens=2, do_sample=False)
    before = [tensor.clone() for tensor in cache.tensors()]
    with pytest.raises(UnsupportedModelError, match=f"{what}.*compressed cache; use greedy search or sampling"):
        call(cache)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors(), strict=True))


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        (PROMPT.repeat(2, 1), (1, slice(-3, None)), "padded on the right or inside; pad on the left"),
        (PROMPT.repeat(2, 1), (0, slice(4, 9)), "padded on the right or inside; pad on the left"),
        (PROMPT.repeat(2, 1), (1, slice(None)), "sequence 1 of the batch has no tokens"),
    ],
)
def test_padding_that_is_refused(model: Any, ids: torch.Tensor, mask: tuple[int, slice], words: str) -> None:
    attention_mask = torch.ones_like(ids)
    attention_mask[mask] = 0
    with at_work(model) as done, pytest.raises(UnsupportedModelError, match=words):
        model.generate(ids, attention_mask=attention_mask, past_key_values=cache_for(model), max_new_tokens=2)
    assert not done


def test_cache_is_as_new_after_a_refused_prompt(model: Any) -> None:
    cache = cache_for(model)
    with pytest.raises(UnsupportedModelError):
        model.generate(torch.full((1, 513), 9), past_key_values=cache, max_new_tokens=2)
    again = model.generate(PROMPT, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(
        again, model.generate(PROMPT, past_key_values=cache_for(model), max_new_tokens=4, do_sample=False)
    )
