"""What `Sampling` refuses."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from rdkv.runtime.engine.sampling import Sampling
from rdkv.runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
        ({"temperature": 1.0, "min_p": 1.1}, "min_p is 1.1"),
        ({"top_k": 5}, "top_k has no effect without sampling"),
        ({"top_p": 0.5}, "top_p has no effect without sampling"),
        ({"min_p": 0.5}, "min_p has no effect without sampling"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"stop": "end"}, "stop is 'end'"),
        ({"stop": ("end", "")}, "none of them empty"),
    ],
)
def test_bad_values(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Sampling(**settings)


def test_from_plain_values() -> None:
    made = msgspec.convert({"temperature": 0.7, "stop": ["\n", "end"], "stop_token_ids": [2]}, Sampling)
    assert (made.stop, made.stop_token_ids, made.max_new_tokens) == (("\n", "end"), (2,), 64)
    with pytest.raises(msgspec.ValidationError, match="unknown field `topp`"):
        msgspec.convert({"topp": 0.5}, Sampling)
