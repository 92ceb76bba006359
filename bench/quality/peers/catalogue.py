"""The peers that tables show, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import rdkv

from ..method import Method
from .pressed import Pressed
from .quantized import Quantized, Quantizer

# These serve SnapKV better than its own: a window of 64 tokens, always kept, is all that fits some small budgets.
WIDE = {"kernel_size": 65, "window_size": 32}

METHODS: tuple[Pressed | Quantized, ...] = (
    Pressed("kvpress-snapkv", "snapkv"),
    Pressed("kvpress-snapkv-wide", "snapkv", WIDE),
    Pressed("kvpress-adakv-snapkv", "adakv-snapkv"),
    Pressed("kvpress-adakv-snapkv-wide", "adakv-snapkv", WIDE),
    Pressed("kvpress-expected-attention", "expected-attention"),
    Pressed("kvpress-adakv-expected-attention", "adakv-expected-attention"),
    Pressed("kvpress-kvzip", "kvzip"),
    Pressed("kvpress-think", "think"),
    Pressed("kvpress-snapkv-think", "snapkv-think"),
    Pressed("kvpress-snapkv-quanto-4", "snapkv", quantizer=Quantizer("quanto", 4)),
    Pressed("kvpress-snapkv-hqq-4", "snapkv", quantizer=Quantizer("hqq", 4)),
    Pressed("kvpress-snapkv-wide-hqq-4", "snapkv", WIDE, Quantizer("hqq", 4)),
    Quantized("transformers-quanto-2", Quantizer("quanto", 2)),
    Quantized("transformers-quanto-4", Quantizer("quanto", 4)),
    Quantized("transformers-hqq-1", Quantizer("hqq", 1)),
    Quantized("transformers-hqq-2", Quantizer("hqq", 2)),
    Quantized("transformers-hqq-4", Quantizer("hqq", 4)),
)
_MODULES = {"kvpress": "kvpress", "quanto": "optimum.quanto", "hqq": "hqq"}


def missing(name: str) -> list[str]:
    """What a peer needs and is not installed, by its name."""
    return [word for word, module in _MODULES.items() if word in name.split("-") and not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


def _ready(method: Method) -> Method:
    """The method itself.

    Raises:
        rdkv.ConfigError: what it needs is not installed.
    """
    if lacks := missing(method.name):
        raise rdkv.ConfigError(f"{method.name} needs {' and '.join(lacks)}; run: make peers")
    return method


# Functions, so that nothing is asked for before it is to be run.
PEERS: dict[str, Callable[[], Method]] = {method.name: partial(_ready, method) for method in METHODS}
