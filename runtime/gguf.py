"""GGUF files: checked, converted once to a folder that loads in a moment, and kept under `home`.

Transformers reads a GGUF file itself, but slowly, and some of what the file says about its tokenizer is
lost on the way; `_repair_tokenizer` puts that back from the file's own metadata.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import ModelLoadError
from .home import home, new_folder

MAGIC = b"GGUF"
# Bumped when a conversion comes out differently, so that older ones are not used.
CONVERSION = 1

logger = logging.getLogger("rdkv")


def is_gguf(path: Path) -> bool:
    """Whether the file is meant to be GGUF: by its name, or by its first four bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def converted_folder(path: Path, sha256: str | None = None) -> Path:
    """The folder (safetensors, tokenizer) that holds the model of a GGUF file, made on first use.

    Args:
        path: the GGUF file.
        sha256: what the file must hash to, if known; an existing conversion is then found without reading it.

    Raises:
        ModelLoadError: another hash, not a GGUF file, truncated, or of an architecture that
            transformers cannot read.
    """
    if sha256 is not None and _folder(sha256).is_dir():
        return _folder(sha256)
    digest = _digest(path)
    if sha256 is not None and digest != sha256:
        raise ModelLoadError(f"{path} is damaged: its sha256 is {digest}, not {sha256}; install it again")
    folder = _folder(digest)
    if not folder.is_dir():
        metadata = read_metadata(path)
        logger.info("converting %s (once; about half a minute for a small model)", path.name)
        try:
            with new_folder(folder) as partial:
                _convert(path, metadata, partial)
        except ModelLoadError:
            raise
        except OSError as error:
            raise ModelLoadError(f"cannot keep the converted {path.name} in {folder.parent}: {error}") from error
    return folder


def read_metadata(path: Path) -> Callable[[str], Any]:
    """Look-up of the file's metadata by key, None where a key is missing.

    Raises:
        ModelLoadError: the file is not GGUF, or ends before its tensors do.
    """
    from gguf import GGUFReader

    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise ModelLoadError(f"{path} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
    try:
        reader = GGUFReader(path)
        fields = {name: reader.fields[name] for name in reader.fields}
    except Exception as error:  # the reader trusts the file: damage shows as any kind of error
        raise ModelLoadError(f"{path} is a corrupt or truncated GGUF file ({_one_line(error)})") from error
    if not reader.tensors:
        raise ModelLoadError(f"{path} is a GGUF file without tensors")

    def look_up(key: str) -> Any:
        field = fields.get(key)
        return None if field is None else field.contents()

    return look_up


def _convert(path: Path, metadata: Callable[[str], Any], folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        loaded = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    except Exception as error:
        raise ModelLoadError(f"transformers cannot read {path}: {_one_line(error)}") from error
    _repair_tokenizer(tokenizer, metadata)
    config = loaded.config
    # The weights are plain floats now; the note that they were quantised would make the folder unreadable.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    from_config: Any = AutoModelForCausalLM.from_config  # has no annotations
    model = from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _repair_tokenizer(tokenizer: Any, metadata: Callable[[str], Any]) -> None:
    """Restore what transformers drops: special tokens by their ids, and a single-digit pre-tokenizer."""
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        token = tokenizer.convert_ids_to_tokens(int(index)) if 0 <= int(index) < len(tokenizer) else None
        if token is None:
            raise ModelLoadError(f"GGUF metadata: the {name} token has id {index}, outside the vocabulary")
        setattr(tokenizer, f"{name}_token", token)
    if metadata("tokenizer.ggml.pre") == "smollm":
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    # Removing blanks before punctuation would change text that the model wrote on purpose, code above all.
    tokenizer.clean_up_tokenization_spaces = False


def _folder(digest: str) -> Path:
    return home() / "models" / f"gguf-{digest}-v{CONVERSION}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
