"""Flags and models that compressed prompts do not go with: one line that names the culprit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig

from rdkv.plugins.sglang.refusals import REFUSED, check_flags, check_model
from rdkv.runtime.errors import ConfigError

FINE = {field: allowed[0] for field, allowed, *_ in REFUSED}
OTHERS: dict[str, Any] = {
    "disable_radix_cache": False,
    "speculative_algorithm": "EAGLE",
    "disaggregation_mode": "prefill",
    "page_size": 16,
    "pp_size": 2,
    "dcp_size": 2,
    "dllm_algorithm": "LowConfidence",
    "prefill_attention_backend": "triton",
    "decode_attention_backend": "triton",
    "kv_cache_dtype": "fp8_e4m3",
}


@pytest.mark.parametrize("refusal", REFUSED, ids=[field for field, *_ in REFUSED])
def test_each_flag_is_named(refusal: tuple[str, tuple[Any, ...], str, str]) -> None:
    field, allowed, flag, why = refusal
    args = SimpleNamespace(**FINE)
    check_flags(args)
    setattr(args, field, OTHERS.get(field, True))
    with pytest.raises(ConfigError) as caught:
        check_flags(args)
    assert str(caught.value) == f"{flag} does not work with --attention-backend rdkv: {why}"
    for value in allowed:
        setattr(args, field, value)
        check_flags(args)


def test_models_with_sliding_windows() -> None:
    check_model(LlamaConfig())
    with pytest.raises(ConfigError, match="--model-path: model type 'mistral' has sliding-window layers"):
        check_model(MistralConfig(sliding_window=4096))
