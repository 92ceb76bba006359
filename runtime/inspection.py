"""What a prompt's cache was compressed to, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from .attention import attach, detach
from .cache import CompressedCache
from .config import CompressionConfig
from .generation import GenerationRequest, prepare_prompt
from .loading import LoadedModel
from .plan import BitPlan


class LayerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One layer of the table.

    Attributes:
        layer: index.
        kept: mean share of tokens that a head keeps.
        value_bits: mean width of the values, over all tokens (0 for evicted ones, 16 for pinned ones).
        key_bits: mean width of the key channels.
        values: share of tokens at each value width, ``pinned`` apart.
        keys: share of channels at each key width.
        bytes: bytes that the layer holds.
        retention: of the layer's bytes in a full 16-bit cache.
    """

    layer: int
    kept: float
    value_bits: float
    key_bits: float
    values: dict[str, float]
    keys: dict[str, float]
    bytes: int
    retention: float


@dataclass(frozen=True)
class Inspection:
    """Rows of the table, and what the picture shows; heads of all layers are stacked, ``R = L * H``.

    Attributes:
        rows: one a layer.
        retention: of the whole cache.
        prompt_tokens: ``T``.
        heads: ``H``.
        value_bits: ``[R, T]``; key_bits: ``[R, D]``; pinned: ``[R, T]``.
        token_scores: ``[R, T]``, as the scorer gave them.
    """

    rows: list[LayerRow]
    retention: float
    prompt_tokens: int
    heads: int
    value_bits: Tensor
    key_bits: Tensor
    pinned: Tensor
    token_scores: Tensor


def inspect_prompt(loaded: LoadedModel, request: GenerationRequest, compression: CompressionConfig) -> Inspection:
    """Read a prompt, compress it and look at the result; nothing is generated."""
    prompt = prepare_prompt(loaded, request)
    cache = CompressedCache(loaded.model.config, compression, keep_scores=True)
    attach(loaded.model)
    try:
        loaded.read(prompt.text, cache)
    finally:
        detach(loaded.model)
    layers = range(len(cache.layers))
    plans = [cache.plan(layer) for layer in layers]
    full = cache.prompt_full_nbytes // len(plans)
    return Inspection(
        rows=[layer_row(i, plan, cache.layer_nbytes(i), full) for i, plan in enumerate(plans)],
        retention=cache.retention,
        prompt_tokens=len(prompt.text),
        heads=plans[0].value_bits.shape[1],
        value_bits=torch.cat([plan.value_bits[0] for plan in plans]).cpu(),
        key_bits=torch.cat([plan.key_bits[0] for plan in plans]).cpu(),
        pinned=torch.cat([plan.pinned[0] for plan in plans]).cpu(),
        token_scores=torch.cat([cache.scores(layer)[0].token[0] for layer in layers]).float().cpu(),
    )


def layer_row(layer: int, plan: BitPlan, nbytes: int, full_nbytes: int) -> LayerRow:
    """Summary of one layer's plan, or of the part of it that is looked at."""
    bits = plan.value_bits.masked_fill(plan.pinned, 16)
    values = _shares(plan.value_bits[~plan.pinned], plan.pinned.numel())
    if pinned := float(plan.pinned.float().mean()):
        values["pinned"] = pinned
    return LayerRow(
        layer=layer,
        kept=float(plan.kept.float().mean()),
        value_bits=float(bits.float().mean()),
        key_bits=float(plan.key_bits.float().mean()),
        values=values,
        keys=_shares(plan.key_bits, plan.key_bits.numel()),
        bytes=nbytes,
        retention=nbytes / full_nbytes,
    )


def _shares(bits: Tensor, total: int) -> dict[str, float]:
    widths, counts = torch.unique(bits, return_counts=True)
    return {str(w): c / total for w, c in zip(widths.tolist(), counts.tolist(), strict=True)}
