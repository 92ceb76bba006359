"""Peers in their own implementations: NVIDIA's kvpress and transformers' `QuantizedCache`."""

from .catalogue import METHODS as METHODS
from .catalogue import PEERS as PEERS
from .catalogue import missing as missing
