"""The peers that tables show, by name."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import rdkv

from ..method import Method
from .pressed import Pressed
from .quantized import Quantized, Quantizer

WIDE = {"kernel_size": 65}  # SnapKV with the smoothing of our default, which serves it, too

PEERS: dict[str, Method] = {
    method.name: method
    for method in (
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
        Pressed("kvpress-snapkv-wide-quanto-4", "snapkv", WIDE, Quantizer("quanto", 4)),
        Quantized("transformers-quanto-2", Quantizer("quanto", 2)),
        Quantized("transformers-quanto-4", Quantizer("quanto", 4)),
        Quantized("transformers-hqq-1", Quantizer("hqq", 1)),
        Quantized("transformers-hqq-2", Quantizer("hqq", 2)),
        Quantized("transformers-hqq-4", Quantizer("hqq", 4)),
    )
}
_MODULES = {"kvpress": "kvpress", "quanto": "optimum.quanto", "hqq": "hqq"}


def peer(name: str) -> Method:
    """The peer called ``name``.

    Raises:
        rdkv.ConfigError: there is none, or what it needs is not installed.
    """
    if name not in PEERS:
        raise rdkv.ConfigError(f"there is no peer {name!r}; there are {', '.join(PEERS)}")
    if lacks := missing(name):
        raise rdkv.ConfigError(f"{name} needs {', '.join(lacks)}; run: make peers")
    return PEERS[name]


def missing(name: str) -> list[str]:
    """What a peer needs and is not installed."""
    needs: list[Any] = [word for word in _MODULES if word in name.split("-")]
    return [word for word in needs if not _installed(_MODULES[word])]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False
