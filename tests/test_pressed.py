"""kvpress at a budget: what its pipeline answers, in the bytes that its tensors say.

Needs what ``make peers`` installs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

import rdkv
from bench.quality.evaluate import Batch, Cell, Kinds
from bench.quality.method import Full, Prompt
from bench.quality.peers import METHODS
from bench.quality.peers.masked import MaskedLayer
from bench.quality.peers.pressed import Pressed
from bench.quality.sample import PROTOCOLS, Protocol, Sample

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed (make peers)")

TOKENS, NEW = 160, 6
ROWS = torch.randint(3, 259, (2, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
MORE = torch.randint(3, 259, (2, NEW), generator=torch.Generator().manual_seed(1))
PRESSED = {method.name: method for method in METHODS if isinstance(method, Pressed) and not method.quantizer}
MASKING = [name for name, method in PRESSED.items() if method.press.startswith(("adakv", "kvzip"))]
EVICTING = ["kvpress-snapkv", "kvpress-expected-attention"]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, tiny_folder: Path) -> Any:
    """With a tokenizer beside it, which KVzip looks for."""
    return rdkv.attach(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=request.param).eval())


@torch.no_grad()
def logits(prompt: Prompt, held: Any, more: torch.Tensor = MORE) -> torch.Tensor:
    positions = torch.arange(TOKENS, TOKENS + more.shape[1])[None]
    found: torch.Tensor = prompt.model(more, past_key_values=held.fork(), position_ids=positions).logits
    return found


@pytest.mark.parametrize("name", PRESSED)
def test_at_the_whole_budget_it_is_the_full_cache(name: str, model: Any) -> None:
    prompt = Prompt.read(model, ROWS)
    with Full().compress(prompt) as held:
        full, nbytes = logits(prompt, held), held.nbytes
    with PRESSED[name].compress(prompt, 1.0) as held:
        assert held.nbytes == held.full_nbytes == nbytes
        assert held.allocated_nbytes is None
        torch.testing.assert_close(logits(prompt, held), full, rtol=0, atol=1e-5 if model.dtype == torch.float32 else 0)


@pytest.mark.parametrize("budget", [0.1, 0.33, 0.7])
@pytest.mark.parametrize("name", [name for name in PRESSED if name != "kvpress-think"])
def test_a_budget_is_kept_and_used(name: str, budget: float, model: Any) -> None:
    """Less is left over than one more pair in every head would take."""
    prompt = Prompt.read(model, ROWS)
    with PRESSED[name].compress(prompt, budget) as held:
        left = budget * held.full_nbytes - held.nbytes
        assert 0 <= left < held.full_nbytes / TOKENS + 64  # offsets and channel maps
        forked = logits(prompt, held)
        assert torch.equal(forked, logits(prompt, held))  # a fork leaves the cache as it is
    with Full().compress(prompt) as held:
        assert not torch.allclose(forked, logits(prompt, held), atol=1e-3)


@pytest.mark.parametrize("name", EVICTING)
def test_bytes_of_eviction_are_those_of_its_tensors(name: str, model: Any) -> None:
    prompt = Prompt.read(model, ROWS)
    with PRESSED[name].compress(prompt, 0.25) as held:
        tensors = [t for layer in held.cache.layers for t in (layer.keys, layer.values)]
        assert {t.shape[2] for t in tensors} == {TOKENS // 4}
        stored = sum(t.untyped_storage().nbytes() for t in tensors)
        assert held.nbytes == stored * 2 // model.dtype.itemsize
        assert held.allocated_nbytes is None


@pytest.mark.parametrize("name", MASKING)
def test_bytes_of_masks_are_those_of_what_is_left(name: str, model: Any) -> None:
    prompt = Prompt.read(model, ROWS)
    with PRESSED[name].compress(prompt, 0.25) as held:
        ragged, offsets, pairs = 0, 0, 0
        for layer in held.cache.layers:
            assert isinstance(layer, MaskedLayer)
            kept = ~layer.evicted
            keys, values = layer.keys[kept].to(torch.bfloat16), layer.values[kept].to(torch.bfloat16)  # [N, D]
            ragged += keys.untyped_storage().nbytes() + values.untyped_storage().nbytes()
            heads = kept.sum(-1)  # [B, H]
            assert len(heads.unique()) > 1
            offsets += torch.nn.functional.pad(heads.cumsum(-1), (1, 0)).to(torch.int32).nbytes
            pairs += int(layer.evicted.sum())
        assert held.nbytes == ragged + offsets
        # kvpress itself holds everything, and three int64 for each pair that it masks.
        assert held.allocated_nbytes == held.full_nbytes + 24 * pairs


def test_bytes_of_think_are_those_without_the_channels_of_zeros(model: Any) -> None:
    prompt = Prompt.read(model, ROWS)
    with PRESSED["kvpress-snapkv-think"].compress(prompt, 0.3) as held:
        expected = 0
        for layer in held.cache.layers:
            left = (layer.keys != 0).any(2)  # [B, H, D]
            assert (left.sum(-1) == 8).all()  # half of 16
            expected += 2 * (int(left.sum()) * layer.keys.shape[2] + layer.values.numel()) + left.numel() // 8
        assert held.nbytes == expected
        assert held.allocated_nbytes == sum(2 * 2 * layer.keys.numel() for layer in held.cache.layers)


def test_think_alone_needs_half_of_the_cache(model: Any) -> None:
    prompt = Prompt.read(model, ROWS)
    with PRESSED["kvpress-think"].compress(prompt, 0.7) as held:
        assert [int((layer.keys != 0).any(2).sum(-1).max()) for layer in held.cache.layers] == [6, 6]  # of 16: 0.69
        assert 0.66 < held.retention < 0.7
    with pytest.raises(rdkv.BudgetError, match="half"), PRESSED["kvpress-think"].compress(prompt, 0.4):
        pass


@pytest.mark.parametrize("name", PRESSED)
def test_a_budget_of_nothing_is_refused(name: str, model: Any) -> None:
    prompt = Prompt.read(model, ROWS)
    with pytest.raises(rdkv.BudgetError), PRESSED[name].compress(prompt, 0.0001):
        pass


@pytest.mark.parametrize("name", [name for name in PRESSED if name != "kvpress-think"])
def test_rows_of_a_batch_are_compressed_each_on_its_own(name: str, model: Any) -> None:
    both = Prompt.read(model, ROWS)
    with PRESSED[name].compress(both, 0.3) as held:
        together = logits(both, held)
    for row, ids in enumerate(ROWS):
        alone = Prompt.read(model, [ids])
        with PRESSED[name].compress(alone, 0.3) as held:
            found = logits(alone, held, MORE[row : row + 1])
        tolerance = 1e-4 if model.dtype == torch.float32 else 0.5
        torch.testing.assert_close(together[row : row + 1], found, rtol=0, atol=tolerance)


@pytest.fixture
def positions_for_hooks() -> Callable[[Any], Iterator[None]]:
    """kvpress's own pipeline does not tell its hooks positions, which older versions of transformers did."""

    def tell(module: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        past = named["past_key_values"].get_seq_length()
        return arguments, {**named, "cache_position": torch.arange(past, past + named["input_ids"].shape[1])}

    return lambda model: model.model.register_forward_pre_hook(tell, with_kwargs=True)


@pytest.mark.parametrize("name", [name for name in PRESSED if name != "kvpress-think"])
def test_answers_are_those_of_kvpress_own_pipeline(
    name: str, tiny_folder: Path, positions_for_hooks: Callable[[Any], Any]
) -> None:
    """The context is compressed, then a question is asked: its pipeline, and our bench with real positions."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = None
    text, question = "".join(chr(33 + (7 * i * i) % 90) for i in range(TOKENS - 1)), "What is it?"
    rdkv.attach(model)
    prompt = Prompt.read(model, [tokenizer(tokenizer.bos_token + text, add_special_tokens=False).input_ids])
    assert prompt.ids.shape[1] == TOKENS
    method = PRESSED[name]
    with method.compress(prompt, 0.4) as held:
        ids = tokenizer(question + "\n", add_special_tokens=False, return_tensors="pt").input_ids
        answer = greedy(prompt, held.fork(), ids)
    rdkv.detach(model)
    pipe = kvpress.KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    press = press_of(method, prompt)
    handle = positions_for_hooks(model)
    try:
        theirs = pipe(text, question=question, press=press, max_new_tokens=8, cache=DynamicCache())["answer"]
    finally:
        handle.remove()
    assert tokenizer.decode(answer, skip_special_tokens=True) == theirs


def press_of(method: Pressed, prompt: Prompt) -> Any:
    from bench.quality.peers.presses import find
    from bench.quality.peers.shape import Shape

    shape = Shape.of(prompt)
    return find(method.press, method.options).fit(shape, int(0.4 * shape.pairs * shape.pair_bytes), shape.pair_bytes)


@torch.no_grad()
def greedy(prompt: Prompt, cache: Any, ids: torch.Tensor) -> list[int]:
    answer: list[int] = []
    at = TOKENS
    while len(answer) < 8:
        positions = torch.arange(at, at + ids.shape[1])[None]
        at += ids.shape[1]
        ids = prompt.model(ids, past_key_values=cache, position_ids=positions).logits[:, -1:].argmax(-1)
        answer.append(int(ids))
    return answer


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["kvpress-snapkv", "kvpress-adakv-snapkv", "kvpress-kvzip"])
def test_cells_of_a_sweep(name: str, protocol: Protocol, model: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Scores, generated answers and both counts of bytes; the whole budget scores as the full cache does."""
    samples = [
        Sample("task", index, 0, tuple(row[:150]), tuple(row[150:]), (7, 8, 9), 4, judge=lambda text: 1.0)
        for index, row in enumerate(ROWS)
    ]
    batch = Batch(model, tiny_tokenizer, samples, protocol, Kinds())
    assert batch.prompt.ids.shape[1] == (TOKENS if protocol == "seen" else 150)
    for budget in (0.3, 1.0):
        for row in batch.records(Cell(PRESSED[name], budget)):
            assert row["fits"]
            assert row["bytes"] <= budget * row["full_bytes"]
            assert row["score"] == 1.0
            masks = name in MASKING and budget < 1
            assert row.get("allocated_bytes", 0) > row["full_bytes"] if masks else "allocated_bytes" not in row
            # The first token of an answer is the full cache's where the question was seen.
            assert row["kl"] > 1e-3 if budget < 1 else row["kl"] < 1e-4
