"""A known decoder's part in generation: prefill in chunks, steps of four products and six small kernels a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...kernels import naive_step
from ...kernels.available import triton_takes
from ..cache import CompressedCache
from . import prefill
from .batch import Batch
from .decoder import Decoder, known_decoder
from .forward import Forward, PlainForward


class FusedForward(Forward):
    """A `Decoder`, with the kernels of `kernels.step` where they can run and plain PyTorch elsewhere."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._step: Any = naive_step
        if triton_takes(decoder.norm.weight):
            from ...kernels import step  # not above: it needs Triton

            self._step = step

    @property
    def capturable(self) -> bool:
        return self._step is not naive_step and self.decoder.static_rotary

    def read(self, ids: Tensor, cache: CompressedCache) -> Tensor:
        return prefill.read(self.decoder, ids, cache)

    def step(self, tokens: Tensor, batch: Batch) -> Tensor:
        decoder, step = self.decoder, self._step
        residual = decoder.embed(tokens[:, None])[:, 0]  # [B, C]
        cos, sin = (t[:, 0].contiguous() for t in decoder.rotary(residual, batch.positions[:, None]))  # [B, R]
        norms = [layer.input_norm for layer in decoder.layers[1:]] + [decoder.norm]  # each after its layer
        hidden = _norm(step, residual, None, decoder.layers[0].input_norm)
        for index, (layer, next_norm) in enumerate(zip(decoder.layers, norms, strict=True)):
            tail, rotation = batch.layers[index], (cos, sin) if layer.rotary else (None, None)
            qkv = layer.qkv(hidden)
            query = step.append(qkv, *rotation, layer.head_norms, tail.lengths, tail.keys, tail.values)
            attended = batch.attend(index, query, layer.attention.scaling)  # [B, H_q, 1, D]
            hidden = _norm(step, residual, layer.attention.o_proj(attended.flatten(1)), layer.post_norm)
            hidden = _norm(step, residual, layer.mlp.down_proj(step.gated(layer.gate_up(hidden))), next_norm)
        logits: Tensor = decoder.head(hidden)
        return logits


def _norm(step: Any, residual: Tensor, delta: Tensor | None, norm: Any) -> Tensor:
    """Add ``delta`` to ``residual`` ``[B, C]`` in place; what ``norm`` makes of it."""
    normed: Tensor = step.add_norm(residual, delta, norm.weight, norm.variance_epsilon)
    return normed


def forward_of(model: Any) -> Forward:
    """The fused way if the model's layers are known, transformers' own otherwise."""
    decoder = known_decoder(model)
    return PlainForward(model) if decoder is None else FusedForward(decoder)
