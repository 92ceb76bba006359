"""A prompt read, compressed and saved: what is reported of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rdkv.runtime import compression
from rdkv.runtime.compression import CompressionReport, compress_prompt
from rdkv.runtime.config import CompressionConfig
from rdkv.runtime.errors import ConfigError
from rdkv.runtime.loading import LoadedModel, load_model
from rdkv.runtime.stored_cache import open_cache

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 3
TIGHT = CompressionConfig(budget=0.3)


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder), "cpu")


def run(loaded: LoadedModel, path: Path, text: str = TEXT, chat: bool = False, **more: Any) -> CompressionReport:
    return compress_prompt(loaded, text, chat, TIGHT, path, **more)


def test_report(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "doc.rdkv"
    report = run(loaded, path)
    assert report.prompt_tokens == len(TEXT)
    assert report.full_cache_bytes == len(TEXT) * 2 * 2 * 16 * 2 * 2
    assert 0.2 < report.retention == report.cache_bytes / report.full_cache_bytes <= 0.3
    assert (report.file, report.file_bytes) == (str(path), path.stat().st_size)
    assert report.file_bytes > report.cache_bytes
    assert min(report.seconds.prefill, report.seconds.compress, report.seconds.save) > 0
    assert (report.scorer, report.budget, report.dtype) == ("attention-distortion", 0.3, "float32")


def test_what_the_file_says(loaded: LoadedModel, tmp_path: Path) -> None:
    run(loaded, tmp_path / "text.rdkv")
    run(loaded, tmp_path / "chat.rdkv", chat=True)
    text, chat = (open_cache(tmp_path / name) for name in ("text.rdkv", "chat.rdkv"))
    assert (text.header.chat, chat.header.chat) == (False, True)
    assert loaded.tokenizer.decode(text.token_ids[0]) == TEXT
    assert loaded.tokenizer.decode(chat.token_ids[0]) == "<s>user: " + TEXT
    assert text.header.model.name == loaded.name


def test_the_model_is_left_as_it_was(loaded: LoadedModel, tmp_path: Path) -> None:
    before = loaded.model.config._attn_implementation
    run(loaded, tmp_path / "doc.rdkv")
    assert loaded.model.config._attn_implementation == before


def test_what_is_refused(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "Engine", lambda *_: pytest.fail("the model ran"))
    for text, words in ((" ", "the prompt is empty"), ("a" * 600, "600 tokens"), ("a" * 512, "no new token fits")):
        with pytest.raises(ConfigError, match=words):
            run(loaded, tmp_path / "doc.rdkv", text)
