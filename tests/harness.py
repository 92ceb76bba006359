"""Drives a compressed cache with keys, values and queries of a test's choosing, without a model."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

import rdkv
from rdkv.runtime.attention import NAME, attention_forward
from rdkv.runtime.layer import CompressedLayer

HEADS, GROUPS, DIM, LAYERS = 2, 2, 16, 2
SCALE = DIM**-0.5
TOKEN_BYTES = 2 * HEADS * DIM * 2  # one token's key and value in one layer, at 16 bits

QKV = tuple[Tensor, Tensor, Tensor]


class Attention(nn.Module):
    """What transformers' attention functions read of the module that calls them."""

    is_causal = True
    num_key_value_groups = GROUPS


def new_cache(budget: float | None = 0.3, **settings: Any) -> rdkv.CompressedCache:
    """A cache for a model of ``LAYERS`` layers that counts as attached."""
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS * GROUPS,
        num_key_value_heads=HEADS,
        hidden_size=HEADS * GROUPS * DIM,
        max_position_embeddings=512,
    )
    config._attn_implementation = NAME
    return rdkv.CompressedCache(config, rdkv.CompressionConfig(budget=budget, **settings), keep_scores=True)


def random_qkv(batch: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> QKV:
    """Queries, keys and values of one layer, ``[B, H_q or H, T, D]``; keys have channels off centre."""
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(batch, HEADS * GROUPS, tokens, DIM, generator=generator)
    keys, values = torch.randn(2, batch, HEADS, tokens, DIM, generator=generator)
    return query.to(dtype), (keys + torch.linspace(-3, 3, DIM)).to(dtype), values.to(dtype)


def forward(cache: rdkv.CompressedCache, layer: int, qkv: QKV, mask: Tensor | None = None) -> Tensor:
    """One layer's part of a forward pass, as a model does it; output ``[B, Q, H_q, D]``."""
    query, keys, values = qkv
    keys, values = cache.update(keys, values, layer)
    return attention_forward(Attention(), query, keys, values, mask, scaling=SCALE)[0]


def prefill(cache: rdkv.CompressedCache, qkv: QKV, mask: Tensor | None = None) -> list[Tensor]:
    """A prompt's pass through every layer, each with the same queries, keys and values."""
    return [forward(cache, layer, qkv, mask) for layer in range(LAYERS)]


def layer_of(cache: rdkv.CompressedCache, layer: int = 0) -> CompressedLayer:
    """A layer of the cache."""
    found = cache.layers[layer]
    assert isinstance(found, CompressedLayer)
    return found


def padding(lengths: list[int]) -> Tensor:
    """Mask ``[B, T]`` of sequences padded on the left to the longest."""
    tokens = max(lengths)
    return torch.arange(tokens) >= tokens - torch.tensor(lengths)[:, None]


def exact_attention(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention in float64, the long way; ``visible`` broadcasts against ``[B, H, Q, N]``.

    Returns:
        ``[B, Q, H_q, D]``.
    """
    keys, values = (t.double().repeat_interleave(GROUPS, 1) for t in (keys, values))
    logits = torch.einsum("bhqd,bhnd->bhqn", query.double(), keys) * SCALE
    logits = logits.masked_fill(~visible.repeat_interleave(GROUPS, 1), float("-inf"))
    return torch.einsum("bhqn,bhnd->bqhd", logits.softmax(-1), values)


def reachable_tensors(start: object) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object, by whatever path; classes and modules end a path."""
    seen, stack = {id(start): start}, [start]  # held, so that no other object gets the same id
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            yield item
        if isinstance(item, FunctionType):  # a closure may hold tensors; its module's globals are not ours
            following = [*(item.__closure__ or ()), *(item.__defaults__ or ())]
        else:
            following = [*gc.get_referents(item), getattr(item, "__dict__", None)]
        for other in following:
            if id(other) not in seen and not isinstance(other, (type, ModuleType, BuiltinFunctionType)):
                seen[id(other)] = other
                stack.append(other)


def storage_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
