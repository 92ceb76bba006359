"""Reading a prompt in little memory: layer by layer, and within a layer in chunks of tokens.

Of the whole prompt there are the hidden states, one layer's queries, keys and values and its attention output;
everything else (norms, projections, the MLP) exists for one chunk at a time, and residuals are added in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import CompressedCache
from ..layer import CompressedLayer
from .decoder import Decoder, DecoderLayer

CHUNK = 4096  # tokens


def read(decoder: Decoder, ids: Tensor, cache: CompressedCache) -> Tensor:
    """Read ``ids`` ``[1, T]`` into ``cache``, after what it holds; logits ``[V]`` of the last position."""
    start, tokens = cache.get_seq_length(), ids.shape[1]
    hidden: Tensor = decoder.embed(ids)  # [1, T, C]
    cos, sin = decoder.rotary(hidden, torch.arange(start, start + tokens, device=ids.device)[None])  # [1, T, R]
    chunks = [slice(begin, min(begin + CHUNK, tokens)) for begin in range(0, tokens, CHUNK)]
    for layer, held in zip(decoder.layers, cache.compressed_layers, strict=True):
        attended = _attend(layer, hidden, cos, sin, chunks, held)
        for chunk in chunks:
            part = hidden[:, chunk]
            part += layer.attention.o_proj(attended[:, chunk].flatten(2))
            part += layer.mlp(layer.post_norm(part))
        del attended  # or it would live until the next layer's exists
    logits: Tensor = decoder.head(decoder.norm(hidden[:, -1]))
    return logits[0]


def _attend(
    layer: DecoderLayer, hidden: Tensor, cos: Tensor, sin: Tensor, chunks: list[slice], held: CompressedLayer
) -> Tensor:
    """Attention output ``[1, T, H_q, D]`` of one layer; its keys and values go to ``held``, which compresses them."""
    whole: list[Tensor] = []  # queries, keys and values [1, T, heads, D]
    for chunk in chunks:
        parts = layer.project(hidden[:, chunk], cos[:, chunk], sin[:, chunk])
        if not whole:
            whole = [part.new_empty(1, hidden.shape[1], *part.shape[2:]) for part in parts]
        for tensor, part in zip(whole, parts, strict=True):
            tensor[:, chunk] = part
    query, key, value = (tensor.transpose(1, 2) for tensor in whole)
    keys, values = held.update(key, value)
    return held.attend(layer.attention, query, keys, values, None, layer.attention.scaling)
