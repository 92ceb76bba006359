"""Our attention inside a transformers model: registered by name, nothing patched.

Keys travel from the cache to the attention function of the same layer as one tensor object. A layer of
ours (`CompressedLayer`) hangs itself on that object, so the attention function knows which cache it serves;
without it (another cache, or none) the function is transformers' own sdpa attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .errors import UnsupportedModelError
from .support import GenerationModes, check_supported, generation_modes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "rdkv"
_LINK = "_rdkv_layer"
_BEFORE = "_rdkv_attention_before"
# Arguments by which a model asks for attention that we do not compute.
_REFUSED = ("softcap", "s_aux", "position_bias", "sliding_window")


class AttendingLayer(Protocol):
    """A cache layer that computes its attention itself."""

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attention of ``query`` ``[B, H_q, Q, D]``, output ``[B, Q, H_q, D]``."""


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Select rdkv's attention in ``model``; any other cache keeps working as with ``sdpa``.

    Beam search and assisted decoding are refused by ``generate`` until `detach`.

    Returns:
        The model itself.

    Raises:
        UnsupportedModelError: a model that a compressed cache cannot serve (`check_supported`).
    """
    check_supported(model.config)
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, padding_mask)
    if model.config._attn_implementation != NAME:
        setattr(model, _BEFORE, model.config._attn_implementation)
        model.set_attn_implementation(NAME)
        # generate() consults this attribute before it does anything else.
        model.__dict__["_supported_generation_modes"] = generation_modes()
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`; a model that is not attached stays as it is."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(getattr(model, _BEFORE, None) or "sdpa")
    if isinstance(model.__dict__.get("_supported_generation_modes"), GenerationModes):
        del model.__dict__["_supported_generation_modes"]  # ours may outlive a change of attention by hand
    return model


def link(keys: Tensor, layer: AttendingLayer) -> Tensor:
    """A view of ``keys`` that carries its cache layer to the attention function."""
    view = keys.view_as(keys)  # a new object: the layer must not end up referring to itself
    setattr(view, _LINK, layer)
    return view


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **more: Any,
) -> Tensor | None:
    """The mask that reaches `attention_forward`: ``[B, kv_length]`` bool, or None where nothing is padded.

    Causality is implied; a ``[Q, T]`` mask of a long prompt would take more memory than its cache. Where more
    than causality and padding is asked for (packed sequences, the unused slots of a static cache), which a
    compressed cache never does, it is sdpa's own 4D mask.
    """
    if mask_function is not causal_mask_function or kv_offset + kv_length != q_offset + q_length:
        more["allow_is_causal_skip"] = False  # None means something else to us
        whole: Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **more,
        )
        return whole
    if attention_mask is None:
        return None
    mask = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return None if bool(mask.all()) else mask


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of ``query`` ``[B, H_q, Q, D]``; output ``[B, Q, H_q, D]``, as transformers expects."""
    if asked := [name for name in _REFUSED if kwargs.get(name) is not None]:
        raise UnsupportedModelError(f"{type(module).__name__} asks for {asked[0]!r}, which rdkv's attention lacks")
    layer: AttendingLayer | None = getattr(key, _LINK, None)
    if layer is None:
        return plain_attention(module, query, key, value, attention_mask, scaling, dropout)
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UnsupportedModelError("a compressed cache takes a 2D attention mask (padding), not a 4D one")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return layer.attend(module, query, key, value, attention_mask, scale), None


def plain_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float = 0.0,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention: causal under the padding in ``mask`` ``[B, N]``, or under a whole 4D mask."""
    new, total = query.shape[2], key.shape[2]
    full = mask
    if 1 < new < total if mask is None else mask.dim() == 2:
        full = causal_mask(new, total, mask, query.device)
    output, _ = sdpa_attention_forward(module, query, key, value, full, dropout=dropout, scaling=scaling)
    return output, None


def causal_mask(new: int, total: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """Which of ``total`` tokens each of the last ``new`` sees, ``[B or 1, 1, new, total]`` bool.

    A padding token sees itself, so that no row of a softmax is empty.
    """
    visible = torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)[None, None]
    if mask is None:
        return visible
    itself = torch.eye(new, dtype=torch.bool, device=device)
    return (visible & mask[:, None, None, :total]) | torch.nn.functional.pad(itself, (total - new, 0))
