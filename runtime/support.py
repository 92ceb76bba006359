"""Which models a compressed cache works with, and how they may generate: refused before any work."""

from __future__ import annotations

from typing import Any

from .errors import UnsupportedModelError

# Families whose attention passes keys and values straight from the cache to the attention function,
# which is all that we rely on. Others may work; nothing is promised for them.
TESTED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3")


def text_config(config: Any) -> Any:
    """The language model's part of a configuration."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def check_supported(config: Any) -> None:
    """Raise if a model of this configuration cannot use a compressed cache.

    Raises:
        UnsupportedModelError: encoder-decoder models, layers with sliding windows, chunked or linear
            attention, key-value sharing between layers, or logit soft-capping.
    """
    name = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"model type {name!r} is an encoder-decoder; rdkv compresses decoder-only models")
    config = text_config(config)
    kinds = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    if any("sliding" in kind for kind in kinds) or (not kinds and window is not None):
        remedy = ""
        if name in TESTED:  # elsewhere more hangs on the window, such as the rotary embedding of Gemma 3
            layers = ' and config.layer_types = ["full_attention"] * config.num_hidden_layers' if kinds else ""
            remedy = (
                " (if no prompt is longer than the window, set config.sliding_window = None"
                f"{layers} before loading the model)"
            )
        raise UnsupportedModelError(
            f"model type {name!r} has sliding-window layers (sliding_window={window}); "
            f"rdkv needs full attention in every layer{remedy}"
        )
    if other := sorted(set(kinds) - {"full_attention"}):
        raise UnsupportedModelError(f"model type {name!r} has layers of {other[0]!r}; rdkv needs full attention")
    if getattr(config, "attention_chunk_size", None) is not None:
        raise UnsupportedModelError(f"model type {name!r} has chunked attention; rdkv needs full attention")
    if getattr(config, "num_kv_shared_layers", None):
        raise UnsupportedModelError(f"model type {name!r} shares keys and values between layers")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError(f"model type {name!r} soft-caps its attention logits")


def model_window(config: Any) -> int | None:
    """Tokens that the model can attend over, or None where its configuration does not say."""
    window: int | None = getattr(text_config(config), "max_position_embeddings", None)
    return window


def check_window(config: Any, tokens: int) -> None:
    """Raise if ``tokens`` are more than the model's window.

    Raises:
        UnsupportedModelError: naming both lengths.
    """
    limit = model_window(config)
    if limit is not None and tokens > limit:
        raise UnsupportedModelError(f"{tokens} tokens are more than the model's window of {limit}; shorten the prompt")


def cache_sizes(config: Any) -> tuple[int, int, int]:
    """Layers of a model's cache, KV heads of each, and their dimension."""
    config = text_config(config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers), int(heads), int(dim)


class GenerationModes(tuple[Any, ...]):
    """The modes of ``generate`` that an attached model supports, worded for the error of transformers."""

    def __repr__(self) -> str:
        return (
            "greedy search and sampling while rdkv is attached (a compressed cache can be neither reordered nor "
            "rolled back, as beam search and assisted decoding need; rdkv.detach(model) allows them again)"
        )

    __str__ = __repr__


def generation_modes() -> GenerationModes:
    """Greedy search and sampling."""
    from transformers.generation.configuration_utils import GenerationMode

    return GenerationModes((GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE))
