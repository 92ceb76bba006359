"""The decoder of a transformers model whose layers we know, in the pieces that a prefill and a decode step are made of.

Products that read the same input are fused (queries, keys and values; gate and up): the modules' weights become
views of the fused ones, so that the model works as before and nothing is held twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.naive_step import HeadNorms
from ..support import TESTED

_DROPOUT = {"resid_attn_dropout", "resid_mlp_dropout"}  # does nothing in evaluation
_HEAD_NORMS = {"q_norm", "k_norm"}
# Names of the products that are fused, or of the one that is so already.
_QKV = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
_GATE_UP = (("gate_proj", "up_proj"), ("gate_up_proj",))
# Frequencies that do not change with the length read.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Product:
    """``x @ weight^T + bias``, of one or more linear modules."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class DecoderLayer:
    """One layer; modules are transformers' own.

    Attributes:
        rotary: applies the rotary embedding to queries and keys; None where the layer has none.
        head_norms: norms of query and key heads, where there are any.
    """

    attention: Any
    mlp: Any
    input_norm: Any
    post_norm: Any
    qkv: Product
    gate_up: Product
    rotary: Callable[..., tuple[Tensor, Tensor]] | None
    head_norms: HeadNorms | None

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, T, H_q, D]``, keys and values ``[B, T, H, D]`` of ``hidden`` ``[B, T, C]``; rotated."""
        attention = self.attention
        heads = self.qkv(self.input_norm(hidden)).view(*hidden.shape[:-1], -1, attention.head_dim)
        kv_heads = heads.shape[2] // (attention.num_key_value_groups + 2)
        query, key, value = torch.split(heads, [heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads], 2)
        if self.head_norms is not None:
            query, key = attention.q_norm(query), attention.k_norm(key)
        if self.rotary is not None:
            query, key = self.rotary(query, key, cos, sin, unsqueeze_dim=2)
        return query, key, value


@dataclass(frozen=True)
class Decoder:
    """Embedding, layers, last norm and head.

    Attributes:
        rotary: from hidden states and positions ``[B, T]`` to cosine and sine ``[B, T, R]``.
        static_rotary: whether that waits for no device.
    """

    embed: Any
    layers: list[DecoderLayer]
    norm: Any
    head: Any
    rotary: Any
    static_rotary: bool


def known_decoder(model: Any) -> Decoder | None:
    """The decoder of ``model`` with its products fused, or None if it has anything that we do not know."""
    if getattr(model.config, "model_type", None) not in TESTED or model.config.hidden_act not in ("silu", "swish"):
        return None
    backbone = getattr(model, "model", None)
    if _children(model) != {"model", "lm_head"} or backbone is None:
        return None
    if _children(backbone) != {"embed_tokens", "layers", "norm", "rotary_emb"} or not _on_one_device(model):
        return None
    if type(model.lm_head) is not nn.Linear or not _is_norm(backbone.norm):
        return None
    if not all(_is_known(layer) for layer in backbone.layers):
        return None
    layers = [_layer(layer) for layer in backbone.layers]
    static = backbone.rotary_emb.rope_type in _STATIC_ROPE
    return Decoder(backbone.embed_tokens, layers, backbone.norm, model.lm_head, backbone.rotary_emb, static)


def fuse(modules: Sequence[nn.Linear]) -> Product:
    """The product of several linear modules side by side; their weights become views of its."""
    weight = _stacked([module.weight for module in modules])
    biases = [module.bias for module in modules if module.bias is not None]
    return Product(weight, _stacked(biases) if biases else None)


@torch.no_grad()
def _stacked(parameters: Sequence[Tensor]) -> Tensor:
    """Parameters one after the other, in one tensor that they become views of; as it is if they are already."""
    first = parameters[0].data
    ends = [p.storage_offset() + p.numel() for p in parameters]
    starts = [p.storage_offset() for p in parameters]
    together = len({p.untyped_storage().data_ptr() for p in parameters}) == 1 and starts[1:] == ends[:-1]
    if together and all(p.is_contiguous() for p in parameters):
        rows = sum(p.shape[0] for p in parameters)
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    stacked = torch.cat([p.data for p in parameters])
    for parameter, part in zip(parameters, torch.split(stacked, [p.shape[0] for p in parameters]), strict=True):
        parameter.data = part
    return stacked


def _layer(layer: Any) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = None
    if _children(attention) >= _HEAD_NORMS:
        norms = HeadNorms(attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon)
    rotary = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return DecoderLayer(
        attention=attention,
        mlp=mlp,
        input_norm=layer.input_layernorm,
        post_norm=layer.post_attention_layernorm,
        qkv=fuse(_named(attention, _QKV)),
        gate_up=fuse(_named(mlp, _GATE_UP)),
        rotary=rotary if getattr(attention, "use_rope", True) else None,
        head_norms=norms,
    )


def _is_known(layer: Any) -> bool:
    """Whether a layer is made of what `DecoderLayer` has, and nothing else."""
    if _children(layer) - _DROPOUT != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    qkv, gate_up = _named(attention, _QKV), _named(mlp, _GATE_UP)
    linears = [*qkv, *gate_up, getattr(attention, "o_proj", None), getattr(mlp, "down_proj", None)]
    if not qkv or not gate_up or any(type(module) is not nn.Linear for module in linears):
        return False
    if any(len({m.bias is None for m in group}) > 1 for group in (qkv, gate_up)):
        return False
    if len(_children(attention) - _HEAD_NORMS) != len(qkv) + 1 or len(_children(mlp)) != len(gate_up) + 2:
        return False
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in _children(attention) & _HEAD_NORMS]
    return all(map(_is_norm, norms))


def _named(module: Any, choices: Sequence[Sequence[str]]) -> list[Any]:
    """The modules of the first choice of names that are all there."""
    children = dict(module.named_children())
    found = [[children[name] for name in names] for names in choices if children.keys() >= set(names)]
    return found[0] if found else []


def _children(module: Any) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_norm(module: Any) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _on_one_device(model: Any) -> bool:
    """Whether all weights are on one device and of one type, and nothing moves them about."""
    weights = {(p.device, p.dtype) for p in model.parameters()}
    return len(weights) == 1 and not any(hasattr(module, "_hf_hook") for module in model.modules())
