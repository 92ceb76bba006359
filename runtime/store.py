"""A compressed cache on disk: `save` writes a file, `load` makes a cache of it again for the model that made it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from .. import __version__
from .cache import CompressedCache
from .checks import blame
from .config import BackendName
from .errors import ConfigError, RdkvError
from .fingerprints import dtype_name, model_fingerprint, tokenizer_fingerprint
from .interfaces import CacheFormat
from .layer import CompressedLayer
from .store_file import VERSION, CacheHeader, ModelRecord, write
from .stored_cache import TOKEN_IDS, open_cache, segment_prefix, tail_prefix
from .support import cache_sizes


def save(
    cache: CompressedCache,
    path: str | Path,
    model: Any,
    token_ids: Tensor | Sequence[Sequence[int]],
    tokenizer: Any = None,
    *,
    chat: bool = False,
    name: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a cache to a file: the packed prompt and the tokens after it, with what tells whose they are.

    The file appears under its name when it is complete and on the disk, or not at all. Scores are not in it.

    Args:
        cache: holds a prompt.
        path: the file; ``.rdkv`` is the usual ending.
        model: the transformers model that filled the cache.
        token_ids: ``[B, N]``, the tokens that the cache holds, padding included; more of them, such as the last one
            that ``generate`` returned, are left out.
        tokenizer: of these tokens, for `load` to compare.
        chat: the prompt is the beginning of a user's message in the tokenizer's chat template, which a question is
            to end (``rdkv compress --chat``).
        name: what the model was loaded by, if not what it says itself.
        overwrite: replace a file of that name.

    Raises:
        ConfigError: the file exists, its folder does not, or the tokens or the model are not the cache's.
        CacheFileError: it cannot be written.
        RdkvError: the cache is empty, or its format cannot be saved.
    """
    path = Path(path).expanduser()
    check_target(path, overwrite)
    held = cache.get_seq_length()
    if not held:
        raise RdkvError("the cache holds no prompt yet; run the model with it first")
    sizes = cache_sizes(model.config)
    if sizes != cache_sizes(cache.model_config):
        raise ConfigError("the cache was not made for this model; save it with the model that filled it")
    config, cache_format = cache.session.config, cache.session.format
    check_savable(cache_format, config.format)
    tensors = {TOKEN_IDS: _token_ids(token_ids, len(cache.prompt_lengths), held)}
    layers = cache.compressed_layers
    header = CacheHeader(
        version=VERSION,
        rdkv=__version__,
        model=ModelRecord(
            name=name or str(getattr(model, "name_or_path", "")),
            fingerprint=model_fingerprint(model),
            dtype=dtype_name(model),
            layers=sizes[0],
            heads=sizes[1],
            dim=sizes[2],
        ),
        tokenizer=None if tokenizer is None else tokenizer_fingerprint(tokenizer, chat),
        compression=msgspec.structs.replace(config, backend="auto"),
        tokens=layers[0].prompt_tokens,
        lengths=cache.prompt_lengths,
        chat=chat,
        layers=tuple(_dump(layer, cache_format, config.format, tensors) for layer in layers),
    )
    write(path, header, tensors)


def load(
    path: str | Path, model: Any, tokenizer: Any = None, *, plugins: Sequence[str] = (), backend: BackendName = "auto"
) -> CompressedCache:
    """The cache that `save` wrote, on the model's device; it gives the same logits, to the bit.

    It is a cache like any other: what is generated with it is added to it. ``cache.token_ids`` are the tokens that
    ``generate`` has to be given before any others.

    Args:
        path: the file.
        model: the transformers model that made it; to be attached (`rdkv.attach`) before it uses the cache.
        tokenizer: compared with the one that the file was saved with, if both are given.
        plugins: modules to load for the cache format, as in `CompressionConfig`; what the file names is not loaded.
        backend: what computes decode attention, as in `CompressionConfig`.

    Raises:
        CacheFileError: no such file, a damaged one or one of a newer rdkv; another model, tokenizer or precision;
            a cache format that is not there.
    """
    return open_cache(path).restore(model, tokenizer, plugins, backend)


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a name that may not be written.

    Raises:
        ConfigError: a file that exists, a folder, or a folder that does not exist.
    """
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; give another name, or overwrite it with --overwrite (overwrite=True)")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {path.parent}")


def check_savable(cache_format: CacheFormat, name: str) -> None:
    """Refuse a format whose caches cannot be saved.

    Raises:
        ConfigError: naming it.
    """
    if type(cache_format).dump is CacheFormat.dump:
        raise ConfigError(f"caches of the format {name!r} cannot be saved: its plugin has no dump() and load()")


def _token_ids(given: Tensor | Sequence[Sequence[int]], batch: int, held: int) -> Tensor:
    ids = torch.as_tensor(given)
    if ids.dim() != 2 or ids.shape[0] != batch or ids.shape[1] < held or ids.is_floating_point():
        raise ConfigError(
            f"token_ids are {list(ids.shape)} {ids.dtype}; the cache holds {batch} sequences of {held} tokens, "
            f"padding included"
        )
    return ids[:, :held].to("cpu", torch.int32, copy=True).contiguous()


def _dump(
    layer: CompressedLayer, cache_format: CacheFormat, name: str, tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], ...]:
    """Headers of a layer's segments; their tensors and the tail's join ``tensors``."""
    headers = []
    for number, (_, segment) in enumerate(layer.segments):
        with blame(f"format {name!r}", f"layer {layer.index}"):
            parts, header = cache_format.dump(segment)
        prefix = segment_prefix(layer.index, number)
        tensors |= {prefix + part: _apart(tensor) for part, tensor in parts.items()}
        headers.append(header)
    assert layer.tail is not None
    prefix = tail_prefix(layer.index)
    tensors |= {prefix + part: _apart(t) for part, t in zip(("keys", "values"), layer.tail.tokens, strict=True)}
    return tuple(headers)


def _apart(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU."""
    return tensor.detach().to("cpu", copy=True).contiguous()
