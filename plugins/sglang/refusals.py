"""What SGLang can do and compressed prompts cannot, or not yet: refused at start, by the name of the flag."""

from __future__ import annotations

from typing import Any

from ...runtime.errors import ConfigError, UnsupportedModelError
from ...runtime.support import check_supported

NAME = "rdkv"
# Field of SGLang's ServerArgs, the values under which it is off, the flag, and why it is refused.
REFUSED: tuple[tuple[str, tuple[Any, ...], str, str], ...] = (
    ("disable_radix_cache", (True,), "the radix cache (set --disable-radix-cache)", "it owns a prompt's freed slots"),
    ("speculative_algorithm", (None,), "--speculative-algorithm", "draft tokens would need the prompt's own cache"),
    ("enable_mixed_chunk", (False,), "--enable-mixed-chunk", "a batch either reads prompts or decodes"),
    ("disaggregation_mode", (None, "null"), "--disaggregation-mode", "a packed prompt is not sent to another server"),
    ("enable_hierarchical_cache", (False,), "--enable-hierarchical-cache", "it stores 16-bit prompts"),
    ("enable_hisparse", (False,), "--enable-hisparse", "it has another layout of the cache"),
    ("enable_streaming_session", (False,), "--enable-streaming-session", "a session continues a prompt that is packed"),
    ("page_size", (None, 1), "--page-size above 1", "freed prompts would leave pages half used"),
    ("pp_size", (1,), "--pp-size above 1", "an arena holds all layers of the model"),
    ("dcp_size", (1,), "--dcp-size above 1", "an arena holds whole prompts"),
    ("enable_dp_attention", (False,), "--enable-dp-attention", "idle ranks would still have to decode"),
    ("enable_pdmux", (False,), "--enable-pdmux", "prompts are packed on the stream that decodes"),
    ("enable_two_batch_overlap", (False,), "--enable-two-batch-overlap", "a batch is decoded as a whole"),
    ("enable_memory_saver", (False,), "--enable-memory-saver", "the arena would not be released"),
    ("dllm_algorithm", (None,), "--dllm-algorithm", "there is no prompt that stays as it is"),
    ("prefill_attention_backend", (None, NAME), "--prefill-attention-backend", 'set "prefill" in --rdkv-config'),
    ("decode_attention_backend", (None, NAME), "--decode-attention-backend", "it is rdkv's own"),
    ("kv_cache_dtype", ("auto", "bf16", "bfloat16"), "--kv-cache-dtype", "new tokens are kept at 16 bits"),
)


def check_flags(server_args: Any) -> None:
    """Refuse flags that a compressed prompt does not go with.

    Raises:
        ConfigError: one line that names the flag.
    """
    for field, allowed, flag, why in REFUSED:
        value = getattr(server_args, field, allowed[0])
        if value not in allowed:
            raise ConfigError(f"{flag} does not work with --attention-backend {NAME}: {why}")


def check_model(hf_config: Any) -> None:
    """Refuse models whose layers are not all of full attention.

    Raises:
        ConfigError: one line that says what the model has.
    """
    try:
        check_supported(hf_config)
    except UnsupportedModelError as error:
        raise ConfigError(f"--model-path: {error}") from error
