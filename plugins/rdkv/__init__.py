"""The reference plugin: attention-distortion scores and the mixed-bit cache format (arXiv 2605.08317)."""

from collections.abc import Mapping
from typing import Any

from ...runtime.hookspecs import hookimpl
from ...runtime.interfaces import CacheFormat, Scorer
from .format import MixedBit
from .scorer import AttentionDistortion

# The paper's settings (arXiv 2605.08317, section "Implementation details" and reference defaults); its
# budget counts neither scales nor permutations, ours does.
PAPER_PRESET: dict[str, Any] = {
    "scorer": "attention-distortion",
    "scorer_options": {
        "window": 32,
        "smoothing": 5,
        "kernel": "mean",
        "ahead": 0.5,
        "token_weight": "first-moment",
        "leverage": 0.0,
        "channel_weight": "think",
        "sinks": 0,
    },
    "allocator": "waterfill",
    "allocator_options": {"scope": "head", "key_share": 0.5},
    "format": "mixed-bit",
    "format_options": {"channel_group": 1, "distortion": "paper", "rotate": False},
    "calibration": "none",
}


@hookimpl
def rdkv_scorers() -> Mapping[str, type[Scorer]]:
    """Scorers by name."""
    return {"attention-distortion": AttentionDistortion}


@hookimpl
def rdkv_formats() -> Mapping[str, type[CacheFormat]]:
    """Cache formats by name."""
    return {"mixed-bit": MixedBit}


@hookimpl
def rdkv_presets() -> Mapping[str, Mapping[str, Any]]:
    """Presets by name."""
    return {"rdkv-paper": PAPER_PRESET}
