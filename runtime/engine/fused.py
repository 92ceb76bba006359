"""A known decoder's part in generation: prefill in chunks, and steps of four products and six small kernels a layer.

With one sequence the small kernels, but for attention's, are part of the products.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...kernels import naive_gemv, naive_step
from ...kernels.available import triton_takes
from ..cache import CompressedCache
from . import prefill
from .batch import Batch
from .decoder import Decoder, DecoderLayer, known_decoder
from .forward import Forward, PlainForward

Rotation = tuple[Tensor, Tensor]  # cosine and sine [B, R] of the tokens' positions


class FusedForward(Forward):
    """A `Decoder`, with the kernels of `kernels.step` and `gemv` where they can run and plain PyTorch elsewhere."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._step: Any = naive_step
        self._gemv: Any = naive_gemv
        if triton_takes(decoder.norm.weight):
            from ...kernels import gemv, step  # not above: they need Triton

            self._step, self._gemv = step, gemv

    @property
    def capturable(self) -> bool:
        return self._step is not naive_step and self.decoder.static_rotary

    def read(self, ids: Tensor, cache: CompressedCache) -> Tensor:
        return prefill.read(self.decoder, ids, cache)

    def step(self, tokens: Tensor, batch: Batch) -> Tensor:
        decoder = self.decoder
        residual = decoder.embed(tokens[:, None])[:, 0]  # [B, C]
        cos, sin = (t[:, 0].contiguous() for t in decoder.rotary(residual, batch.positions[:, None]))  # [B, R]
        run = self._single if len(tokens) == 1 else self._several
        return run(residual, (cos, sin), batch)

    def _several(self, residual: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        """Logits ``[B, V]`` of a batch whose tokens are embedded as ``residual`` ``[B, C]``, which is overwritten."""
        decoder, step = self.decoder, self._step
        norms = [layer.input_norm for layer in decoder.layers[1:]] + [decoder.norm]  # each after its layer
        hidden = _norm(step, residual, None, decoder.layers[0].input_norm)
        for index, (layer, next_norm) in enumerate(zip(decoder.layers, norms, strict=True)):
            attended = self._attend(index, layer, layer.qkv(hidden), rotation, batch)
            hidden = _norm(step, residual, layer.attention.o_proj(attended), layer.post_norm)
            hidden = _norm(step, residual, layer.mlp.down_proj(step.gated(layer.gate_up(hidden))), next_norm)
        logits: Tensor = decoder.head(hidden)
        return logits

    def _single(self, residual: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        """As `_several`, of one sequence; norms, sums and activations are part of the products."""
        decoder, gemv = self.decoder, self._gemv
        for index, layer in enumerate(decoder.layers):
            qkv = gemv.norm_gemv(residual, *_known(layer.input_norm), *_both(layer.qkv))
            attended = self._attend(index, layer, qkv, rotation, batch)
            gemv.add_gemv(residual, attended, *_both(layer.attention.o_proj))
            inner = gemv.gated_gemv(residual, *_known(layer.post_norm), *_both(layer.gate_up))
            gemv.add_gemv(residual, inner, *_both(layer.mlp.down_proj))
        logits: Tensor = gemv.norm_gemv(residual, *_known(decoder.norm), *_both(decoder.head))
        return logits

    def _attend(self, index: int, layer: DecoderLayer, qkv: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        """Attention ``[B, H_q * D]`` of the newest tokens, whose keys and values join the tails."""
        tail, turned = batch.layers[index], rotation if layer.rotary else (None, None)
        query = self._step.append(qkv, *turned, layer.head_norms, tail.lengths, tail.keys, tail.values)
        return batch.attend(index, query, layer.attention.scaling).flatten(1)


def _norm(step: Any, residual: Tensor, delta: Tensor | None, norm: Any) -> Tensor:
    """Add ``delta`` to ``residual`` ``[B, C]`` in place; what ``norm`` makes of it."""
    normed: Tensor = step.add_norm(residual, delta, norm.weight, norm.variance_epsilon)
    return normed


def _known(norm: Any) -> tuple[Tensor, float]:
    """Weight ``[C]`` of an RMS norm, and what keeps its root from 0."""
    return norm.weight, norm.variance_epsilon


def _both(product: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear module, or of a product."""
    return product.weight, product.bias


def forward_of(model: Any) -> Forward:
    """The fused way if the model's layers are known, transformers' own otherwise."""
    decoder = known_decoder(model)
    return PlainForward(model) if decoder is None else FusedForward(decoder)
