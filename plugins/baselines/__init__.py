"""Scorers to compare with: published eviction methods and a random one."""

from collections.abc import Mapping

from ...runtime.hookspecs import hookimpl
from ...runtime.interfaces import Scorer
from .expected_attention import ExpectedAttention
from .key_norm import KeyNorm
from .random import Random
from .snapkv import SnapKV
from .streaming import Streaming
from .think import Think


@hookimpl
def rdkv_scorers() -> Mapping[str, type[Scorer]]:
    """Scorers by name."""
    return {
        "snapkv": SnapKV,
        "key-norm": KeyNorm,
        "streaming": Streaming,
        "expected-attention": ExpectedAttention,
        "think": Think,
        "random": Random,
    }
