"""The file itself: whole or refused, and there or not."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import safetensors
import torch
from safetensors.torch import save_file

from rdkv.runtime import store_file
from rdkv.runtime.config import CompressionConfig
from rdkv.runtime.errors import CacheFileError
from rdkv.runtime.store_file import KEY, CacheHeader, ModelRecord, read, write

TENSORS = {
    "codes": torch.arange(300, dtype=torch.int16).reshape(30, 10),
    "nothing": torch.zeros(0, 4, dtype=torch.float16),
    "scales": torch.randn(7, 2).bfloat16(),
}
HEADER = CacheHeader(
    version=1,
    rdkv="0.1.0",
    model=ModelRecord(name="a\\\"model'\nof é", fingerprint="f" * 32, dtype="float32", layers=1, heads=2, dim=16),
    tokenizer=None,
    compression=CompressionConfig(budget=0.3, scorer_options={"window": "8"}),
    tokens=5,
    lengths=(5, 3),
    chat=False,
    layers=(({"kind": "whole"}, {}),),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "doc.rdkv", HEADER, TENSORS)
    return tmp_path / "doc.rdkv"


def error_of(path: Path) -> str:
    with pytest.raises(CacheFileError) as caught:
        read(path)
    message = str(caught.value)
    assert message.count(str(path)) == 1
    assert "\n" not in message
    return message


def forge(path: Path, header: bytes, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    """A file with any header and the right checksum."""
    save_file(tensors, path, {KEY: header.decode()})
    store_file._seal(path)
    return path


def test_what_is_read_is_what_was_written(file: Path) -> None:
    header, tensors = read(file)
    assert msgspec.structs.replace(header, checksum=HEADER.checksum) == HEADER
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_any_reader_of_safetensors_opens_it(file: Path) -> None:
    with safetensors.safe_open(file, "pt") as opened:
        assert set(opened.keys()) == set(TENSORS)
        assert msgspec.json.decode(opened.metadata()[KEY])["compression"]["budget"] == 0.3


def test_every_byte_counts(file: Path) -> None:
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        error_of(file)


@pytest.mark.parametrize("byte", [0x00, 0x20, 0x30, 0x7F, 0xFF])
def test_other_bytes(file: Path, byte: int) -> None:
    whole = file.read_bytes()
    for at in range(0, len(whole), 3):
        if whole[at] != byte:
            file.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
            error_of(file)


def test_every_length_counts(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        error_of(file)
    for more in (b"\0", whole):
        file.write_bytes(whole + more)
        assert "is damaged" in error_of(file)


def test_damage_is_called_so(file: Path) -> None:
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    for at in (60, 200, size, size + 8, len(whole) - 1):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert "is damaged: it was cut short or altered" in error_of(file)
    for length in (100, size // 2, size + 8, size + 20, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert "is damaged: it was cut short or altered" in error_of(file)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"", b"hello", os.urandom(500), b"\xff" * 500, bytes(1000)):
        path.write_bytes(content)
        assert "is not a cache that rdkv saved; `rdkv compress` writes one" in error_of(path)
    for metadata in (None, {"format": "pt"}):
        save_file(TENSORS, path, metadata)
        assert "is not a cache that rdkv saved" in error_of(path)


def test_no_file(tmp_path: Path) -> None:
    assert "cannot read" in error_of(tmp_path / "none.rdkv")
    assert "is not a file" in error_of(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in error_of(tmp_path / "pipe")


def test_newer_version(tmp_path: Path) -> None:
    newer = msgspec.json.encode({"version": 2, "checksum": "a scheme of its own", "more": [1]})
    save_file(TENSORS, tmp_path / "new.rdkv", {KEY: newer.decode()})
    message = error_of(tmp_path / "new.rdkv")
    assert "was written by a newer rdkv (layout 2, this one reads 1); upgrade rdkv" in message


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 0},
        {"lengths": []},
        {"lengths": [0]},
        {"layers": [[1]]},
        {"more": 1},
        {"model": {"name": "a"}},
        {"model": msgspec.to_builtins(HEADER.model) | {"heads": 1 << 40}},
        {"model": msgspec.to_builtins(HEADER.model) | {"dim": 1 << 40}},
        {"compression": {"budget": 7.0}},
        {"compression": {"budget": 0.1, "budget_tokens": 3}},
        {"version": 1.5},
    ],
)
def test_forged_headers(tmp_path: Path, change: dict[str, object]) -> None:
    header = msgspec.to_builtins(HEADER) | change
    message = error_of(forge(tmp_path / "doc.rdkv", msgspec.json.encode(header)))
    assert "compress the prompt again" in message


def test_nested_without_end(tmp_path: Path) -> None:
    text = msgspec.json.encode(msgspec.to_builtins(HEADER) | {"layers": [[{"a": 0}]]})
    error_of(forge(tmp_path / "doc.rdkv", text.replace(b'{"a":0}', b'{"a":' + b"[" * 99999 + b"]" * 99999 + b"}")))


def test_header_larger_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "doc.rdkv"
    for size in (1 << 62, (1 << 64) - 1, 1000):
        path.write_bytes(size.to_bytes(8, "little") + b'{"__metadata__":{"rdkv":"{}"}}')
        error_of(path)


def test_tensors_larger_than_the_file(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"shape":[30,10]', b'"shape":[30,99]'))
    damaged = file.read_bytes()
    digits = damaged.find(store_file.BEFORE) + len(store_file.BEFORE)
    blank = store_file.BLANK.encode()
    file.write_bytes(damaged[:digits] + blank + damaged[digits + len(blank) :])
    store_file._seal(file)
    assert "is not what rdkv writes (SafetensorError" in error_of(file)


def test_rights_are_those_of_any_new_file(file: Path) -> None:
    (file.parent / "other").touch()
    assert file.stat().st_mode == (file.parent / "other").stat().st_mode


def test_interrupted_write_leaves_what_was_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("store_file._seal", "home.os.replace", "home.os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(f"rdkv.runtime.{step}", interrupt)
            with pytest.raises(KeyboardInterrupt):
                write(file, HEADER, {"codes": TENSORS["codes"]})
        assert file.read_bytes() == before
        assert os.listdir(file.parent) == [file.name]


def test_options_that_json_does_not_hold(tmp_path: Path) -> None:
    odd = msgspec.structs.replace(HEADER.compression, scorer_options={"window": object()})
    with pytest.raises(CacheFileError, match="a plugin's option is not what JSON holds"):
        write(tmp_path / "doc.rdkv", msgspec.structs.replace(HEADER, compression=odd), TENSORS)
    assert os.listdir(tmp_path) == []


def test_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheFileError, match=r"cannot write .*none/doc\.rdkv: No such file or directory"):
        write(tmp_path / "none" / "doc.rdkv", HEADER, TENSORS)

    def full(*_: object) -> None:
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CacheFileError, match=r"cannot write .*/doc\.rdkv: No space left on device"):
        write(tmp_path / "doc.rdkv", HEADER, TENSORS)
    assert os.listdir(tmp_path) == []
