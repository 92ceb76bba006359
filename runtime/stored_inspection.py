"""What is in a saved cache, layer by layer; no model is needed for it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from ..kernels.backends import TorchBackend
from .errors import ConfigError
from .inspection import LayerRow, layer_row
from .layer import CompressedLayer
from .plan import BitPlan
from .session import Session
from .storage import storage_bytes
from .stored_cache import StoredCache


class StoredInspection(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What ``rdkv inspect --cache FILE --json`` prints.

    Attributes:
        file, file_bytes: the file, and its bytes.
        rdkv: the version that wrote it.
        model, dtype: what the model was called, and the type of its weights.
        chat: whether the prompt was made with the chat template.
        prompts: how many there are.
        prompt_tokens: tokens of all prompts, without padding.
        later_tokens: tokens after each of them, at 16 bits.
        cache_bytes: bytes that the cache holds once it is loaded, later tokens included.
        full_cache_bytes: bytes of the same tokens in a full 16-bit cache.
        retention: ``cache_bytes / full_cache_bytes``.
        layers: none where the format was told not to keep positions.
        scorer, allocator, format, budget, budget_tokens, budget_bytes: what compressed it.
    """

    file: str
    file_bytes: int
    rdkv: str
    model: str
    dtype: str
    chat: bool
    prompts: int
    prompt_tokens: int
    later_tokens: int
    cache_bytes: int
    full_cache_bytes: int
    retention: float
    layers: list[LayerRow]
    scorer: str
    allocator: str
    format: str
    budget: float | None = None
    budget_tokens: int | None = None
    budget_bytes: int | None = None


def inspect_stored(stored: StoredCache, plugins: Sequence[str] = ()) -> StoredInspection:
    """Look at a saved cache.

    Raises:
        CacheFileError: a cache format that is not there, or tensors that are not what it packs.
    """
    header, compression = stored.header, stored.header.compression
    session = Session(None, compression)
    layers = [CompressedLayer(index, session, TorchBackend()) for index in range(header.model.layers)]
    stored.fill(layers, stored.cache_format(plugins), [torch.device("cpu")] * len(layers))
    later = stored.token_ids.shape[1] - header.tokens
    numbers = 2 * (sum(header.lengths) + later * len(header.lengths)) * header.model.heads * header.model.dim
    full = [numbers * layer.keys.dtype.itemsize for layer in layers if layer.keys is not None]
    held = [storage_bytes(layer.tensors()) for layer in layers]
    try:
        rows = [
            layer_row(layer.index, _real(layer.plan(), header.lengths), *sizes)
            for layer, *sizes in zip(layers, held, full, strict=True)
        ]
    except ConfigError:  # without positions there is no plan
        rows = []
    return StoredInspection(
        file=str(stored.path),
        file_bytes=stored.path.stat().st_size,
        rdkv=header.rdkv,
        model=header.model.name,
        dtype=header.model.dtype,
        chat=header.chat,
        prompts=len(header.lengths),
        prompt_tokens=sum(header.lengths),
        later_tokens=later,
        cache_bytes=sum(held),
        full_cache_bytes=sum(full),
        retention=sum(held) / sum(full),
        layers=rows,
        **compression.choices,
    )


def _real(plan: BitPlan, lengths: Sequence[int]) -> BitPlan:
    """The plan of the tokens that are no padding, one after the other."""
    _, heads, tokens = plan.value_bits.shape
    real = torch.arange(tokens) >= tokens - torch.tensor(lengths)[:, None]  # [B, T]
    held = real.unsqueeze(1).expand(-1, heads, -1)
    return BitPlan(plan.value_bits[held], plan.key_bits, plan.pinned[held])
