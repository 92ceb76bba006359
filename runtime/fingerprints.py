"""Fingerprints of a model and of a tokenizer: a cache means something only to those that made it."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import msgspec
import torch
from torch import Tensor

from .calibration import FINGERPRINT_FIELDS
from .errors import UnsupportedModelError
from .support import text_config

# What a forward pass takes from a configuration beyond the shapes; None where a model has no such field.
FIELDS = (
    *FINGERPRINT_FIELDS,
    "hidden_act",
    "rms_norm_eps",
    "layer_types",
    "no_rope_layers",
    "partial_rotary_factor",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
)
ROWS = 8  # of each weight
DIGEST = 16  # bytes
# Accents, another script, spaces, numbers, code: what tokenizers treat in different ways.
PROBE = "Grüße, 世界!  The answer\tis 1234567.\n\ndef f(x):\n    return x  # naïve 🙂"


def model_fingerprint(model: Any) -> str:
    """32 hexadecimal digits for a transformers model, alike wherever it is loaded at the same precision.

    A hash of the configuration's fields that decide what keys and values come out (`FIELDS`), and of every weight's
    name, shape, type and ``ROWS`` rows, evenly spaced from the first to the last. So a model that was trained
    further, quantised or loaded at another precision has a fingerprint of its own. One that differs in other rows
    alone, as after an edit of a few rows by hand, is taken for the same.

    Raises:
        UnsupportedModelError: a weight that is not in memory.
    """
    config = text_config(model.config)
    digest = blake2b(digest_size=DIGEST)
    digest.update(msgspec.json.encode({name: getattr(config, name, None) for name in FIELDS}, order="sorted"))
    for name, weight in sorted(model.named_parameters()):
        if weight.is_meta:
            raise UnsupportedModelError(f"the weight {name} is offloaded; a saved cache needs the model in memory")
        digest.update(f"{name} {list(weight.shape)} {weight.dtype} ".encode())
        digest.update(_sample(weight.detach()))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any, chat: bool) -> str:
    """32 hexadecimal digits for a transformers tokenizer: its vocabulary and what it makes of a difficult text.

    Args:
        chat: whether the chat template counts.
    """
    digest = blake2b(digest_size=DIGEST)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    for token, number in sorted(vocabulary.items()):
        digest.update(f"{len(token)} {token} {number} ".encode("utf-8", "surrogatepass"))
    template = getattr(tokenizer, "chat_template", None) if chat else None
    ids = tokenizer(PROBE, add_special_tokens=True, verbose=False).input_ids
    digest.update(msgspec.json.encode([list(ids), template]))
    return digest.hexdigest()


def dtype_name(model: Any) -> str:
    """The type of a model's weights, such as ``bfloat16``."""
    return str(model.dtype).removeprefix("torch.")


def layer_devices(model: Any, layers: int) -> list[torch.device]:
    """Where each layer of a model is, and so its cache; all where the model is unless it is spread over several."""
    blocks = getattr(model.get_decoder(), "layers", ())
    if len(blocks) != layers:
        return [model.device] * layers
    return [next(block.parameters()).device for block in blocks]


def _sample(weight: Tensor) -> bytes:
    """Bytes of ``ROWS`` rows of a weight, all of it where it has no more."""
    rows = weight.reshape(-1, weight.shape[-1]) if weight.dim() > 1 else weight.reshape(1, -1)
    last = rows.shape[0] - 1
    index = sorted({i * last // (ROWS - 1) for i in range(ROWS)})
    chosen = rows[torch.tensor(index, device=rows.device)] if last >= 0 else rows
    return chosen.contiguous().view(torch.uint8).cpu().numpy().tobytes()
