"""Reading in chunks: the model's own logits and cache, and how much of the prompt exists at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import reductions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rdkv
from rdkv.runtime.engine import prefill
from rdkv.runtime.engine.decoder import known_decoder

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"]
IDS = torch.randint(3, 259, (1, 50), generator=torch.Generator().manual_seed(0))
StorageWeakRef: Any = reductions.StorageWeakRef  # torch leaves it untyped


def cache_for(model: Any, budget: float = 0.3) -> rdkv.CompressedCache:
    return rdkv.CompressedCache(model.config, rdkv.CompressionConfig(budget=budget))


def read(model: Any, ids: Tensor, cache: Any) -> Tensor:
    decoder = known_decoder(model)
    assert decoder is not None
    with torch.inference_mode():
        return prefill.read(decoder, ids, cache)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [7, 50, 4096])
@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_logits_and_cache_are_the_models(
    family: str, dtype: torch.dtype, chunk: int, budget: float, tiny_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(prefill, "CHUNK", chunk)
    model = tiny_model(family, dtype)
    mine, theirs = cache_for(model, budget), cache_for(model, budget)
    logits = [read(model, part, mine) for part in (IDS[:, :40], IDS[:, 40:])]  # a prompt and a turn after it
    rdkv.attach(model)
    with torch.no_grad():
        expected = [model(part, past_key_values=theirs).logits[0, -1] for part in (IDS[:, :40], IDS[:, 40:])]
    tolerance = 1e-3 if dtype == torch.float32 else 0.3
    for a, b in zip(logits, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert mine.get_seq_length() == theirs.get_seq_length() == 50
    assert mine.prompt_nbytes == pytest.approx(theirs.prompt_nbytes, rel=0.05)
    if dtype == torch.float32:
        for layer in range(2):
            same = mine.plan(layer).value_bits == theirs.plan(layer).value_bits
            assert same.float().mean() > 0.95


class Peak(TorchDispatchMode):
    """Most bytes at once of the tensors made in it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in given:
                self._made[key] = (StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes())
        self.bytes = max(self.bytes, sum(nbytes for _, nbytes in self._made.values()))
        return out


class ReadLayer:
    """Stands for a cache's layer: keeps nothing, and attends with PyTorch's own attention."""

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values

    def attend(self, module: Any, query: Tensor, keys: Tensor, values: Tensor, mask: None, scale: float) -> Tensor:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(query, keys, values, is_causal=True, scale=scale).transpose(1, 2).contiguous()


class ReadCache:
    def __init__(self, layers: int) -> None:
        self.compressed_layers = [ReadLayer() for _ in range(layers)]

    def get_seq_length(self) -> int:
        return 0


def test_only_a_chunk_of_the_wide_tensors_exists(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the prompt's length are hidden states and one layer's queries, keys, values and attention output."""
    sizes = {"hidden_size": 64, "intermediate_size": 2048, "num_key_value_heads": 4, "num_hidden_layers": 4}
    model = tiny_model("llama", vocab_size=5000, max_position_embeddings=4096, **sizes)
    ids = torch.randint(3, 259, (1, 2000))
    whole = 4 * ids.shape[1] * 64  # bytes of the prompt's hidden states

    def peak(run: Callable[[], Any]) -> float:
        with torch.inference_mode(), Peak() as mode:
            run()
        return mode.bytes / whole

    decoder = known_decoder(model)
    assert decoder is not None
    monkeypatch.setattr(prefill, "CHUNK", 40)
    cache: Any = ReadCache(4)
    chunked = peak(lambda: prefill.read(decoder, ids, cache))
    # Hidden, query, key, value, output; cosine and sine of 16 of 64 channels; a chunk's MLP, 4 x 32 / 50.
    assert 5 < chunked < 7.5
    assert peak(lambda: model(ids, use_cache=False, logits_to_keep=1)) > 60
