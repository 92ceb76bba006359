"""Prompts, caches and turns of conversations under ``generate``, for tests of the cache."""

from __future__ import annotations

from typing import Any

import torch
from harness import LAYERS, TOKEN_BYTES, padding
from torch import Tensor

import rdkv
from rdkv.kernels.tail import CAPACITY

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"]
LENGTHS = [40, 33, 20]
IDS = torch.randint(3, 259, (3, 40), generator=torch.Generator().manual_seed(0))
MASK = padding(LENGTHS).long()
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
}


def cache_for(model: Any, budget: float | None = 0.3, **settings: Any) -> rdkv.CompressedCache:
    return rdkv.CompressedCache(model.config, rdkv.CompressionConfig(budget=budget, **settings))


def generate(model: Any, cache: Any, ids: Tensor = IDS, tokens: int = 8, **more: Any) -> Any:
    torch.manual_seed(0)
    more = {"do_sample": False, "pad_token_id": 0} | more
    return model.generate(ids, past_key_values=cache, max_new_tokens=tokens, **more)


def room(cache: Any, batch: int) -> int:
    """Bytes of the buffers for up to ``CAPACITY`` tokens after the prompt, in all layers."""
    element: int = cache.layers[0].keys.element_size()
    return LAYERS * batch * CAPACITY * TOKEN_BYTES * element // 2


def later_turn(ids: Tensor, mask: Tensor | None, lengths: list[int]) -> tuple[Tensor, Tensor | None]:
    """A conversation so far and a further turn, which is padded on its own left."""
    turn = torch.randint(3, 259, (ids.shape[0], max(lengths)), generator=torch.Generator().manual_seed(5))
    if mask is None:
        return torch.cat([ids, turn], 1), None
    new = ids.shape[1] - mask.shape[1]
    seen = torch.nn.functional.pad(mask, (0, new), value=1)
    return torch.cat([ids, turn], 1), torch.cat([seen, padding(lengths).long()], 1)


def converse(model: Any, cache: Any, mask: Tensor | None, turns: int = 3) -> Tensor:
    out: Tensor = generate(model, cache, attention_mask=mask)
    for _ in range(turns - 1):
        out, mask = later_turn(out, mask, [6, 2, 4] if mask is not None else [6])
        out = generate(model, cache, out, attention_mask=mask)
    return out
