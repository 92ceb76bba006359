"""One run: what it reports, that turns join the cache, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from rdkv.runtime.cache import CompressedCache
from rdkv.runtime.compression import compress_prompt
from rdkv.runtime.config import CompressionConfig
from rdkv.runtime.engine.engine import Engine
from rdkv.runtime.errors import ConfigError
from rdkv.runtime.generation import GenerationReport, GenerationRequest, continue_generation, run_generation
from rdkv.runtime.loading import LoadedModel, load_model
from rdkv.runtime.store import load

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 3
TIGHT = CompressionConfig(budget=0.3)
WHOLE = CompressionConfig(budget=1.0)


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder), "cpu")


def run(loaded: LoadedModel, compression: CompressionConfig | None, **changes: Any) -> GenerationReport:
    request = GenerationRequest(**({"prompt": TEXT, "max_new_tokens": 8} | changes))
    return run_generation(loaded, request, compression)


def test_report_of_a_compressed_run(loaded: LoadedModel) -> None:
    report = run(loaded, TIGHT, question="Who?")
    assert report.prompt_tokens == len(TEXT) + len("\n\nWho?")
    assert report.new_tokens == 8
    assert report.retention == report.cache_bytes / report.full_cache_bytes
    assert 0.2 < report.retention <= 0.3
    # 2 layers of 2 heads with 16 channels, keys and values, 2 bytes a number.
    assert report.full_cache_bytes == report.prompt_tokens * 2 * 2 * 16 * 2 * 2
    for shares in report.bits.values():
        assert sum(shares.values()) == pytest.approx(1.0)
    assert min(report.seconds.prefill, report.seconds.compress, report.seconds.decode) > 0
    assert (report.scorer, report.allocator, report.format) == ("attention-distortion", "waterfill", "mixed-bit")
    assert (report.budget, report.device, report.dtype) == (0.3, "cpu", "float32")


def test_report_of_a_full_cache(loaded: LoadedModel) -> None:
    report = run(loaded, None)
    assert report.retention == 1.0
    assert report.cache_bytes == report.full_cache_bytes == report.prompt_tokens * 2 * 2 * 16 * 2 * 2
    assert report.bits == {"value": {"16": 1.0}, "key": {"16": 1.0}}
    assert report.seconds.compress == 0.0
    printed = msgspec.json.decode(msgspec.json.encode(report))
    assert printed["format"] == "full"
    assert "scorer" not in printed
    assert "budget" not in printed


@pytest.mark.parametrize("changes", [{}, {"question": "Who?"}, {"question": "Who?", "chat": True}])
def test_whole_budget_writes_what_the_full_cache_writes(loaded: LoadedModel, changes: dict[str, Any]) -> None:
    full = run(loaded, None, **changes)
    assert run(loaded, WHOLE, **changes).text == full.text
    if "question" in changes:
        assert run(loaded, None, compress_first=True, **changes).text == full.text
        assert run(loaded, WHOLE, compress_first=True, **changes).text == full.text


@pytest.mark.parametrize("compression", [TIGHT, None])
def test_question_of_a_later_turn_is_read_once(loaded: LoadedModel, compression: CompressionConfig | None) -> None:
    seen: list[int] = []
    hook = loaded.model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    report = run(loaded, compression, question="Who?", compress_first=True, max_new_tokens=3)
    hook.remove()
    assert seen == [len(TEXT), len("\n\nWho?"), 1, 1]
    assert report.prompt_tokens == seen[0] + seen[1]
    # The question joined the tail: neither figure counts it.
    assert report.full_cache_bytes == seen[0] * 2 * 2 * 16 * 2 * 2


def test_sampling_follows_its_seed(loaded: LoadedModel) -> None:
    def sample(seed: int) -> str:
        return run(loaded, TIGHT, temperature=1.5, top_p=0.95, seed=seed, max_new_tokens=24).text

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize("compression", [TIGHT, None])
def test_stop_texts_end_the_answer(loaded: LoadedModel, compression: CompressionConfig | None) -> None:
    way: dict[str, Any] = {"temperature": 3.0, "seed": 1, "max_new_tokens": 24}
    free = run(loaded, compression, **way)
    stop = next(letter for letter in free.text[4:] if letter.isascii() and free.text.count(letter) == 1)
    report = run(loaded, compression, stop=(stop,), **way)
    assert report.text == free.text[: free.text.index(stop)]
    assert report.new_tokens < free.new_tokens


def test_greedy_whatever_the_checkpoint_prefers(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(loaded, None).text
    monkeypatch.setattr(loaded.model.generation_config, "do_sample", True)
    monkeypatch.setattr(loaded.model.generation_config, "temperature", 5.0)
    assert run(loaded, None).text == expected


def test_stops_at_the_end_token(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = loaded.tokenizer(TEXT, return_tensors="pt").input_ids
    first = int(loaded.model(prompt).logits[0, -1].argmax())
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", first)
    assert run(loaded, TIGHT).new_tokens == 1


def test_the_model_is_left_as_it_was(loaded: LoadedModel) -> None:
    before = loaded.model.config._attn_implementation
    run(loaded, TIGHT)
    with pytest.raises(ConfigError):
        run(loaded, CompressionConfig(budget=0.3, scorer="nobody"))
    assert loaded.model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p is 0.0"),
        ({"top_p": 1.5, "temperature": 1.0}, "top_p is 1.5"),
        ({"top_p": 0.5}, "top_p has no effect"),
        ({"seed": -1}, "seed is -1"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "a" * 600}, "the prompt has 600 tokens, but the model's window is 512"),
        ({"prompt": "a" * 510}, "ask for at most 2 new tokens"),
    ],
)
def test_bad_requests(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(Engine, "compress", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ConfigError, match=words):
        run(loaded, TIGHT, **changes)


@pytest.mark.parametrize("chat", [False, True])
def test_a_saved_prompt_answers_as_one_that_was_just_read(loaded: LoadedModel, tmp_path: Path, chat: bool) -> None:
    compress_prompt(loaded, TEXT, chat, TIGHT, tmp_path / "doc.rdkv")
    asked = {"question": "Who?", "chat": chat}
    expected = run(loaded, TIGHT, compress_first=True, **asked)
    seen: list[int] = []
    hook = loaded.model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    cache = load(tmp_path / "doc.rdkv", loaded.model, loaded.tokenizer)
    report = continue_generation(loaded, GenerationRequest(max_new_tokens=8, **asked), cache)
    hook.remove()
    assert seen[0] < 30  # the question alone was read
    assert report.text == expected.text
    for name in ("prompt_tokens", "new_tokens", "cache_bytes", "full_cache_bytes", "bits", "scorer", "budget"):
        assert getattr(report, name) == getattr(expected, name), name
    assert report.seconds.compress == 0


def test_what_a_saved_prompt_cannot_be_asked(loaded: LoadedModel, tmp_path: Path) -> None:
    compress_prompt(loaded, TEXT, False, TIGHT, tmp_path / "doc.rdkv")

    def ask(**request: Any) -> None:
        continue_generation(loaded, GenerationRequest(**request), load(tmp_path / "doc.rdkv", loaded.model))

    with pytest.raises(ConfigError, match="give --question"):
        ask()
    with pytest.raises(ConfigError, match="the question is empty"):
        ask(question=" ")
    with pytest.raises(ConfigError, match="ask for at most"):
        ask(question="Who?", max_new_tokens=500)
    with pytest.raises(ConfigError, match="the cache holds 0 prompts"):
        continue_generation(loaded, GenerationRequest(question="Who?"), CompressedCache(loaded.model.config, TIGHT))


def test_without_positions_there_are_no_shares(loaded: LoadedModel) -> None:
    report = run(loaded, CompressionConfig(budget=0.3, format_options={"positions": "no"}))
    assert report.bits == {}
    assert report.retention <= 0.3


def test_16_bit_model(tiny_folder: Path) -> None:
    half = load_model(str(tiny_folder), "cpu", "bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert run(half, WHOLE).text == run(half, None).text
    assert run(half, TIGHT).retention <= 0.3
