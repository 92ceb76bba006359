"""What a file must say to become a cache, and whose it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from harness import padding
from torch import Tensor

import rdkv
from rdkv.runtime import store_file
from rdkv.runtime.errors import CacheFileError
from rdkv.runtime.stored_cache import StoredCache, open_cache

TinyModel = Callable[..., Any]
IDS = torch.randint(3, 259, (3, 40), generator=torch.Generator().manual_seed(0))
LENGTHS = [40, 23, 31]


@pytest.fixture(scope="module")
def file(tiny_model: TinyModel, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A padded batch of three, saved with its tokenizer."""
    model = rdkv.attach(tiny_model("llama"))
    cache = rdkv.CompressedCache(model.config, rdkv.CompressionConfig(budget=0.3))
    with torch.no_grad():
        model(IDS, attention_mask=padding(LENGTHS).long(), past_key_values=cache)
    path = tmp_path_factory.mktemp("store") / "doc.rdkv"
    rdkv.save(cache, path, model, IDS, tiny_tokenizer)
    return path


@pytest.fixture
def stored(file: Path) -> StoredCache:
    return open_cache(file)


def refused(act: Callable[[], object], words: str) -> None:
    """One line with these words and the file's name."""
    with pytest.raises(CacheFileError) as caught:
        act()
    message = str(caught.value)
    assert words in message
    assert message.count("doc.rdkv") == 1
    assert "\n" not in message


def rewritten(stored: StoredCache, tmp_path: Path, tensors: dict[str, Tensor] | None = None, **header: Any) -> Path:
    """Another file with the right checksum: some of its header or its tensors are other ones."""
    path = tmp_path / "doc.rdkv"
    new = msgspec.structs.replace(stored.header, **header)
    store_file.write(path, new, {name: t.clone() for name, t in (stored.tensors | (tensors or {})).items()})
    return path


def test_another_model(file: Path, tiny_model: TinyModel) -> None:
    def load(model: Any) -> Callable[[], object]:
        return lambda: rdkv.load(file, model)

    refused(load(tiny_model("llama", seed=1)), "was made by another model, without a name (weights or configuration")
    refused(load(tiny_model("mistral")), "weights or configuration differ")
    words = "this one has 3 layers of 2 KV heads of 16 channels, the other 2 layers of 2 KV heads of 16"
    refused(load(tiny_model("llama", num_hidden_layers=3)), words)
    refused(load(tiny_model("llama", num_key_value_heads=4)), "2 layers of 4 KV heads of 16")
    refused(load(tiny_model("llama", vocab_size=100)), "tokens are not in its vocabulary")
    refused(load(tiny_model("llama", torch.bfloat16)), "load the model in float32 (--dtype float32)")


def test_another_tokenizer(file: Path, tiny_model: TinyModel, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    rdkv.load(file, model, tiny_tokenizer)
    other = copy.deepcopy(tiny_tokenizer)
    other.chat_template = "{{ messages }}"
    rdkv.load(file, model, other)  # the template was not used
    other.add_tokens(["fox"])
    refused(lambda: rdkv.load(file, model, other), "was made with another tokenizer; use that of")


def test_plugins_that_are_not_there(stored: StoredCache, tmp_path: Path, tiny_model: TinyModel) -> None:
    other = msgspec.structs.replace(stored.header.compression, format="halves", plugins=("halves.py",))
    path = rewritten(stored, tmp_path, compression=other)
    refused(
        lambda: rdkv.load(path, tiny_model("llama")),
        "unknown format 'halves'; known: mixed-bit; install the plugin that packed it, or load it with -p "
        "(it was made with -p halves.py)",
    )
    # What only compresses need not be there to read.
    other = msgspec.structs.replace(stored.header.compression, scorer="nobody", calibration="nowhere.json")
    path = rewritten(stored, tmp_path, compression=other)
    model = rdkv.attach(tiny_model("llama"))
    cache = rdkv.load(path, model)
    assert cache.retention <= 0.3
    cache.reset()
    with pytest.raises(rdkv.ConfigError, match="unknown scorer 'nobody'"):
        model(IDS, past_key_values=cache)


def test_what_the_file_names_is_not_loaded(stored: StoredCache, tmp_path: Path, tiny_model: TinyModel) -> None:
    trap = tmp_path / "trap.py"
    trap.write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'sprung')!r}).touch()")
    other = msgspec.structs.replace(stored.header.compression, plugins=(str(trap),))
    path = rewritten(stored, tmp_path, compression=other)
    rdkv.load(path, tiny_model("llama"))
    assert not (tmp_path / "sprung").exists()


def test_options_that_the_format_lacks(stored: StoredCache, tmp_path: Path, tiny_model: TinyModel) -> None:
    other = msgspec.structs.replace(stored.header.compression, format_options={"colour": "red"})
    path = rewritten(stored, tmp_path, compression=other)
    refused(lambda: rdkv.load(path, tiny_model("llama")), "has no option 'colour'")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lengths": (40, 23)}, "no token ids of 2 sequences"),
        ({"lengths": (41, 23, 31)}, "40 token ids for a prompt of 40 and 41"),
        ({"tokens": 39}, "40 token ids for a prompt of 39 and 40"),
        ({"tokens": 41}, "40 token ids for a prompt of 41 and 40"),
        ({"tokens": 1 << 70}, "40 token ids for a prompt of"),
        ({"lengths": (40, 23, 23)}, "layer 0 has 3 segments"),
        ({"layers": ()}, "0 layers, not 2"),
        ({"layers": ((), ())}, "layer 0 has 0 segments"),
        ({"layers": (({},) * 3, ({},) * 4)}, "layer 1 has 4 segments"),
    ],
)
def test_headers_that_contradict_the_tensors(
    stored: StoredCache, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = rewritten(stored, tmp_path, **change)
    refused(lambda: open_cache(path), f"is not what rdkv writes: {words}")


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("token_ids", torch.zeros(3, 40), "no token ids"),
        ("token_ids", torch.zeros(3, dtype=torch.int32), "no token ids"),
        ("token_ids", torch.zeros(3, 41, dtype=torch.int32), "layer 0 has no tail of [3, 2, 1, 16]"),
        ("layers.1.tail.keys", torch.zeros(3, 2, 1, 16), "layer 1 has no tail of [3, 2, 0, 16]"),
        ("layers.1.tail.values", torch.zeros(3, 2, 0, 16, dtype=torch.int32), "layer 1 has no tail"),
    ],
)
def test_tensors_of_another_shape(stored: StoredCache, tmp_path: Path, name: str, tensor: Tensor, words: str) -> None:
    path = rewritten(stored, tmp_path, {name: tensor})
    refused(lambda: open_cache(path), words)


def test_tensors_that_are_missing(stored: StoredCache, tmp_path: Path) -> None:
    for name in ("token_ids", "layers.0.tail.keys"):
        rest = replace(stored, tensors={n: t for n, t in stored.tensors.items() if n != name})
        path = rewritten(rest, tmp_path)
        refused(lambda path=path: open_cache(path), "is not what rdkv writes")


def test_every_tensor_of_a_segment_is_checked(stored: StoredCache, tmp_path: Path, tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    names = [name for name in stored.tensors if name.startswith("layers.1.segments.2.")]
    assert len(names) == 11
    for name in names:
        tensor = stored.tensors[name]
        for other in (torch.cat([tensor, tensor[:1]]) if len(tensor) else tensor.new_zeros(3), tensor.double()):
            path = rewritten(stored, tmp_path, {name: other})
            refused(lambda path=path: rdkv.load(path, model), "is not what rdkv writes: format 'mixed-bit', layer 1")


def test_tokens_are_in_the_vocabulary(stored: StoredCache, tmp_path: Path, tiny_model: TinyModel) -> None:
    for token in (-1, 259):
        ids = stored.token_ids.clone()
        ids[1, 3] = token
        path = rewritten(stored, tmp_path, {"token_ids": ids})
        refused(lambda path=path: rdkv.load(path, tiny_model("llama")), "not in its vocabulary")


def test_whatever_the_tensors_say_nothing_else_is_read(
    stored: StoredCache, tmp_path: Path, tiny_model: TinyModel
) -> None:
    """With bytes changed and the checksum put right a file is refused, or read without leaving its tensors."""
    model: Any = rdkv.attach(tiny_model("llama"))
    chance = torch.Generator().manual_seed(0)
    names = [name for name in stored.tensors if ".segments." in name and stored.tensors[name].numel()]
    read = 0
    for case in range(140):
        name = names[case % len(names)]
        octets = stored.tensors[name].clone().reshape(-1).view(torch.uint8)
        octets[torch.randint(len(octets), (1,), generator=chance)] ^= 1 << (case // len(names) % 8)
        tensor = octets.view(stored.tensors[name].dtype).reshape(stored.tensors[name].shape)
        path = rewritten(stored, tmp_path, {name: tensor})
        try:
            cache = open_cache(path).restore(model)
        except CacheFileError:
            continue
        read += 1
        assert cache.bits.keys() == {"value", "key"}
        with torch.no_grad():  # PyTorch raises where an index is out of bounds
            model(torch.full((3, 1), 5), attention_mask=padding([41, 24, 32]).long(), past_key_values=cache)
    assert 40 < read < 140
