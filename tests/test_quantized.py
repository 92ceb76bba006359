"""transformers' quantised cache as a method: bytes of its storages, and prompts that stay as they are.

Needs what ``make peers`` installs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import reachable_tensors, storage_bytes

import rdkv
from bench.quality.method import Full, Prompt
from bench.quality.peers import PEERS, missing
from bench.quality.peers.quantized import Quantized, Quantizer
from bench.quality.peers.shape import Shape

TOKENS = 160
ROWS = torch.randint(3, 259, (2, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
MORE = torch.randint(3, 259, (2, 150), generator=torch.Generator().manual_seed(1))
CASES = [("quanto", 2), ("quanto", 4), ("hqq", 1), ("hqq", 2), ("hqq", 4)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def method(request: pytest.FixtureRequest) -> Quantized:
    backend, bits = request.param
    if missing(f"transformers-{backend}"):
        pytest.skip(f"{backend} is not installed (make peers)")
    return Quantized("it", Quantizer(backend, bits, group=16))  # heads of tiny models have 16 channels


@torch.no_grad()
def logits(prompt: Prompt, held: Any) -> torch.Tensor:
    positions = torch.arange(TOKENS, TOKENS + MORE.shape[1])[None]
    found: torch.Tensor = prompt.model(MORE, past_key_values=held.fork(), position_ids=positions).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_its_storages(method: Quantized, dtype: torch.dtype, tiny_model: Callable[..., Any]) -> None:
    prompt = Prompt.read(rdkv.attach(tiny_model(dtype=dtype)), ROWS)
    share = (method.quantizer.bits + 2) / 16  # a scale and a zero point of 16 bits for 16 numbers
    with method.compress(prompt, 0.9) as held:
        assert held.nbytes == share * held.full_nbytes
        layers = held.cache.layers
        assert all(layer.keys.numel() == layer.values.numel() == 0 for layer in layers)
        if dtype == torch.bfloat16:
            gc.collect()
            assert held.nbytes == storage_bytes(stored(layers))
    with pytest.raises(rdkv.BudgetError, match="budget"), method.compress(prompt, share - 0.001):
        pass


def stored(layers: Any) -> Any:
    """Plain tensors that can be reached from the quantised prompt; a wrapper of tensors has no storage of its own."""
    for layer in layers:
        for part in (layer._quantized_keys, layer._quantized_values):
            yield from (t for t in reachable_tensors(part) if type(t) is torch.Tensor)


def test_more_bits_are_nearer_to_the_full_cache(tiny_model: Callable[..., Any]) -> None:
    prompt = Prompt.read(rdkv.attach(tiny_model()), ROWS)
    with Full().compress(prompt) as held:
        full = logits(prompt, held)
    for backend, widths in (("quanto", (2, 4)), ("hqq", (1, 2, 4, 8))):
        if missing(f"transformers-{backend}"):
            pytest.skip(f"{backend} is not installed (make peers)")
        errors = []
        for bits in widths:
            with Quantized("it", Quantizer(backend, bits, group=16)).compress(prompt, 1.0) as held:  # type: ignore[arg-type]
                errors.append((logits(prompt, held) - full).norm().item())
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.5 * errors[0]


def test_a_fork_leaves_the_prompt_as_it_is(method: Quantized, tiny_model: Callable[..., Any]) -> None:
    """Also behind the 128 tokens after which transformers would pack those that followed."""
    prompt = Prompt.read(rdkv.attach(tiny_model()), ROWS)
    with method.compress(prompt, 1.0) as held:
        first = logits(prompt, held)
        assert torch.equal(first, logits(prompt, held))
        assert held.cache.get_seq_length() == TOKENS


@pytest.mark.parametrize("tokens", [131, 157])
def test_tokens_that_fill_no_byte_stay_at_16_bits(
    tokens: int, method: Quantized, tiny_model: Callable[..., Any]
) -> None:
    prompt = Prompt.read(rdkv.attach(tiny_model()), [ROWS[0][:tokens]])
    rest = tokens % method.quantizer.multiple(Shape(2, 1, 2, tokens, 16))
    assert rest or method.quantizer.bits == 4  # two heads of one group each fill a byte at 4 bits
    with method.compress(prompt, 0.9) as held:
        share = method.quantizer.pair_share
        assert held.nbytes == ((tokens - rest) * share + rest) * held.full_nbytes / tokens
        assert held.cache.get_seq_length() == tokens
        assert all(layer.keys.numel() == rest * 2 * 16 for layer in held.cache.layers)


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.25])
@pytest.mark.parametrize("name", ["kvpress-snapkv-quanto-4", "kvpress-snapkv-wide-hqq-4"])
def test_what_a_press_leaves_may_be_quantised(name: str, budget: float, tiny_model: Callable[..., Any]) -> None:
    if missing(name):
        pytest.skip(f"{name} needs {missing(name)} (make peers)")
    prompt = Prompt.read(rdkv.attach(tiny_model(head_dim=64)), ROWS)
    with PEERS[name]().compress(prompt, budget) as held:
        kept = held.cache.get_seq_length()
        assert held.nbytes == kept / TOKENS * (4 + 0.5) / 16 * held.full_nbytes
        assert 0 <= budget * held.full_nbytes - held.nbytes <= held.full_nbytes / TOKENS
        assert logits(prompt, held).isfinite().all()
