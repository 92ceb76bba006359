"""The file of a saved cache: safetensors, with a header of ours in its metadata and one checksum over all of it.

safetensors' ``__metadata__`` holds strings only, so the header is JSON in one of them (`KEY`) rather than a container
around a safetensors file: so every tool that reads safetensors can list what is in a file. The checksum is BLAKE2b of
the whole file with the checksum's own digits as zeros: whatever byte changes, it is noticed. It tells damage, not
malice; what is read is checked against what it is read for all the same, and nothing in a file is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import msgspec
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .config import CompressionConfig
from .errors import CacheFileError
from .home import new_file

VERSION = 1
KEY = "rdkv"
DIGITS = 64  # of the checksum
BLANK = "0" * DIGITS
BEFORE = b'\\"checksum\\":\\"'  # as JSON in a string of JSON
CHUNK = 1 << 20  # bytes read at once

Count = Annotated[int, msgspec.Meta(ge=1)]


class ModelRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The model that made a cache.

    Attributes:
        name: what it was loaded by.
        fingerprint: `model_fingerprint`.
        dtype: of its weights, such as ``bfloat16``.
        layers, heads, dim: sizes of its cache; KV heads.
    """

    name: str
    fingerprint: str
    dtype: str
    layers: Count
    heads: Annotated[int, msgspec.Meta(ge=1, le=1 << 10)]  # far more than there are, and less than fills a memory
    dim: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]


class CacheHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything of a saved cache but its tensors.

    Attributes:
        version: of the file's layout.
        checksum: over the file.
        rdkv: the version that wrote it.
        model: what made it.
        tokenizer: `tokenizer_fingerprint`, if it was known.
        compression: what compressed it; plugins are named and never loaded from here.
        tokens: of the prompt, padding included.
        lengths: tokens of each sequence's prompt without padding.
        chat: whether the prompt is the open beginning of a user's message in the chat template (`document`).
        layers: for each layer the headers of its segments, one for every length, or none where nothing was packed.
    """

    version: int
    checksum: str = BLANK
    rdkv: str
    model: ModelRecord
    tokenizer: str | None
    compression: CompressionConfig
    tokens: Count
    lengths: Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)]
    chat: bool
    layers: tuple[tuple[dict[str, Any], ...], ...]


class _Opening(msgspec.Struct):
    """What a header of any version has."""

    version: Count
    checksum: str


class _Safetensors(msgspec.Struct, rename={"metadata": "__metadata__"}):
    """The beginning of a safetensors file that is ours."""

    metadata: dict[str, str]


def write(path: Path, header: CacheHeader, tensors: Mapping[str, Tensor]) -> None:
    """Write a file so that ``path`` holds all of it, or what it held before.

    Args:
        path: in a folder that is there.
        header: its checksum is filled in.
        tensors: contiguous, on the CPU, none sharing its storage with another.

    Raises:
        CacheFileError: it cannot be written.
    """
    try:
        text = msgspec.json.encode(msgspec.structs.replace(header, checksum=BLANK)).decode()
    except TypeError as error:  # an option from Python
        raise CacheFileError(f"cannot write {path}: a plugin's option is not what JSON holds: {error}") from error
    try:
        with new_file(path) as partial:
            safetensors.torch.save_file(dict(tensors), partial, {KEY: text})
            _seal(partial)
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) else None
        raise CacheFileError(f"cannot write {path}: {why or error}") from error


def read(path: Path) -> tuple[CacheHeader, dict[str, Tensor]]:
    """Header and tensors, on the CPU, of a file that is whole. Takes the file's size of memory twice for a moment.

    Raises:
        CacheFileError: no such file, not one of ours, damaged, or of a newer rdkv.
    """
    try:
        if path.exists() and not path.is_file():
            raise CacheFileError(f"{path} is not a file")
        data = path.read_bytes()
    except OSError as error:
        raise CacheFileError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        size = int.from_bytes(data[:8], "little")
        text = msgspec.json.decode(data[8 : 8 + size], type=_Safetensors).metadata[KEY]
        opening = msgspec.json.decode(text, type=_Opening)
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, RecursionError) as error:
        if KEY.encode() not in data[:64]:
            raise CacheFileError(f"{path} is not a cache that rdkv saved; `rdkv compress` writes one") from error
        raise _damaged(path) from error
    if opening.version > VERSION:
        raise CacheFileError(
            f"{path} was written by a newer rdkv (layout {opening.version}, this one reads {VERSION}); upgrade rdkv"
        )
    if _checksum(data, opening.checksum) != opening.checksum:
        raise _damaged(path)
    return _decode(path, data, text)


def _decode(path: Path, data: bytes, text: str) -> tuple[CacheHeader, dict[str, Tensor]]:
    try:
        return msgspec.json.decode(text, type=CacheHeader), safetensors.torch.load(data)
    except Exception as error:  # the checksum is right, so that somebody made it so: whatever a library says of it
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CacheFileError(f"{path} is not what rdkv writes ({detail}); compress the prompt again") from error


def _damaged(path: Path) -> CacheFileError:
    return CacheFileError(
        f"{path} is damaged: it was cut short or altered, as its checksum shows; copy it or compress the prompt again"
    )


def _checksum(data: bytes, digits: str) -> str:
    """Checksum of a file that has ``digits`` for one; nothing if they are not where they belong."""
    at = data.find(BEFORE + digits.encode()) + len(BEFORE)
    if len(digits) != DIGITS or at < len(BEFORE):
        return ""
    digest = blake2b(digest_size=DIGITS // 2)
    view = memoryview(data)
    for part in (view[:at], BLANK.encode(), view[at + DIGITS :]):
        digest.update(part)
    return digest.hexdigest()


def _seal(path: Path) -> None:
    """Put the checksum of a file with a blank one into its place."""
    digest = blake2b(digest_size=DIGITS // 2)
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        at = 8 + file.read(size).index(BEFORE + BLANK.encode()) + len(BEFORE)
        file.seek(0)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        file.seek(at)
        file.write(digest.hexdigest().encode())
