"""A saved cache as its file has it: checked in itself, compared with a model, and made a cache of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from .cache import CompressedCache
from .checks import blame
from .config import BackendName
from .errors import CacheFileError, ConfigError, PluginError, RdkvError
from .fingerprints import dtype_name, layer_devices, model_fingerprint, tokenizer_fingerprint
from .interfaces import CacheFormat, PackedSegment
from .layer import CompressedLayer
from .registry import load_registry
from .session import Group, groups_of
from .store_file import CacheHeader, read
from .support import cache_sizes, text_config

TOKEN_IDS = "token_ids"
TAIL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def segment_prefix(layer: int, number: int) -> str:
    """Beginning of the names of a segment's tensors."""
    return f"layers.{layer}.segments.{number}."


def tail_prefix(layer: int) -> str:
    """Beginning of the names of a tail's ``keys`` and ``values``."""
    return f"layers.{layer}.tail."


def open_cache(path: str | Path) -> StoredCache:
    """What a file holds, read and found whole; no model is needed for it.

    Raises:
        CacheFileError: no such file, a damaged one or one of a newer rdkv.
    """
    path = Path(path).expanduser()
    stored = StoredCache(path, *read(path))
    stored.check()
    return stored


@dataclass(frozen=True)
class StoredCache:
    """Contents of a file, on the CPU.

    Attributes:
        path: for messages.
        header: everything but the tensors.
        tensors: by name.
    """

    path: Path
    header: CacheHeader
    tensors: dict[str, Tensor]

    @property
    def groups(self) -> list[Group]:
        """Sequences by length."""
        return groups_of([self.header.tokens - length for length in self.header.lengths])

    @property
    def token_ids(self) -> Tensor:
        """``[B, N]`` int32."""
        return self.tensors[TOKEN_IDS]

    def check(self) -> None:
        """Raise unless header and tensors agree with each other, as far as the cache format is not asked.

        Raises:
            CacheFileError: saying where they do not.
        """
        header, batch = self.header, len(self.header.lengths)
        ids = self.tensors.get(TOKEN_IDS)
        if ids is None or ids.dtype != torch.int32 or ids.dim() != 2 or ids.shape[0] != batch:
            raise self._wrong(f"no token ids of {batch} sequences")
        if not max(header.lengths) <= header.tokens <= ids.shape[1]:
            raise self._wrong(f"{ids.shape[1]} token ids for a prompt of {header.tokens} and {max(header.lengths)}")
        if len(header.layers) != header.model.layers:
            raise self._wrong(f"{len(header.layers)} layers, not {header.model.layers}")
        for index, segments in enumerate(header.layers):
            if len(segments) not in ((0, 1) if min(header.lengths) == header.tokens else (len(self.groups),)):
                raise self._wrong(f"layer {index} has {len(segments)} segments")
            shape = (batch, header.model.heads, ids.shape[1] - (header.tokens if segments else 0), header.model.dim)
            tail = [self.tensors.get(tail_prefix(index) + part) for part in ("keys", "values")]
            if any(t is None or t.shape != shape or t.dtype not in TAIL_DTYPES for t in tail):
                raise self._wrong(f"layer {index} has no tail of {list(shape)}")

    def cache_format(self, plugins: Sequence[str] = ()) -> CacheFormat:
        """The format that packed it.

        Raises:
            CacheFileError: it is not there, or has no such options.
        """
        compression = self.header.compression
        try:
            return load_registry(plugins).format(compression.format, compression.format_options)
        except ConfigError as error:
            made = f" (it was made with -p {' -p '.join(compression.plugins)})" if compression.plugins else ""
            raise CacheFileError(
                f"{self.path}: {error}; install the plugin that packed it, or load it with -p{made}"
            ) from error

    def fill(self, layers: Sequence[CompressedLayer], cache_format: CacheFormat, devices: list[torch.device]) -> None:
        """Give empty layers what was stored of them.

        Raises:
            CacheFileError: tensors that are not what the format packs.
        """
        for layer, headers, device in zip(layers, self.header.layers, devices, strict=True):
            tail = [self.tensors[tail_prefix(layer.index) + part].to(device, copy=True) for part in ("keys", "values")]
            try:
                with blame(f"format {self.header.compression.format!r}", f"layer {layer.index}"):
                    segments, joined = self._segments(layer.index, headers, cache_format, device)
            except PluginError as error:
                raise self._wrong(str(error)) from error
            except RdkvError as error:
                raise CacheFileError(f"{self.path}: {error}") from error
            layer.resume(self.header.tokens, self.groups, segments, joined, (tail[0], tail[1]))

    def restore(
        self, model: Any, tokenizer: Any = None, plugins: Sequence[str] = (), backend: BackendName = "auto"
    ) -> CompressedCache:
        """A cache for the model that made it, see `rdkv.load`."""
        self.check_model(model, tokenizer)
        cache_format = self.cache_format(plugins)
        config = msgspec.structs.replace(self.header.compression, plugins=tuple(plugins), backend=backend)
        cache = CompressedCache.for_stored(model.config, config)
        layers = cache.compressed_layers
        self.fill(layers, cache_format, layer_devices(model, len(layers)))
        cache.session.prompt_lengths = list(self.header.lengths)
        cache.keep_token_ids(self.token_ids)
        return cache

    def check_config(self, config: Any) -> None:
        """Refuse a model by its configuration, before its weights are read.

        Raises:
            CacheFileError: another number or size of layers.
        """
        record = self.header.model
        sizes, wanted = cache_sizes(config), (record.layers, record.heads, record.dim)
        if sizes != wanted:
            has, made = ("{} layers of {} KV heads of {}".format(*counts) for counts in (sizes, wanted))
            raise self._other(f"this one has {has} channels, the other {made}")
        ids = self.token_ids
        if not 0 <= int(ids.min()) <= int(ids.max()) < int(text_config(config).vocab_size):
            raise self._other("tokens are not in its vocabulary")

    def check_model(self, model: Any, tokenizer: Any) -> None:
        """Refuse a model or a tokenizer that is not the one that made it.

        Raises:
            CacheFileError: naming the difference.
        """
        record = self.header.model
        self.check_config(model.config)
        if dtype_name(model) != record.dtype:
            raise CacheFileError(
                f"{self.path} was made with a model in {record.dtype}, and this one is in {dtype_name(model)}; "
                f"load the model in {record.dtype} (--dtype {record.dtype})"
            )
        if model_fingerprint(model) != record.fingerprint:
            raise self._other("weights or configuration differ")
        if tokenizer is None or self.header.tokenizer is None:
            return
        if tokenizer_fingerprint(tokenizer, self.header.chat) != self.header.tokenizer:
            what = "tokenizer or another chat template" if self.header.chat else "tokenizer"
            raise CacheFileError(
                f"{self.path} was made with another {what}; use that of {record.name}, or compress the prompt again"
            )

    def _segments(
        self, layer: int, headers: Sequence[dict[str, Any]], cache_format: CacheFormat, device: torch.device
    ) -> tuple[list[PackedSegment], PackedSegment | None]:
        """A layer's segments, and all of them as one if the format joins them."""
        segments = []
        sizes = self.header.model
        for number, (group, header) in enumerate(zip(self.groups, headers, strict=False)):  # or none
            prefix = segment_prefix(layer, number)
            held = ((name.removeprefix(prefix), t) for name, t in self.tensors.items() if name.startswith(prefix))
            parts = {name: t.to(device, copy=True) for name, t in held}  # into storages of their own
            shape = (len(group.rows), sizes.heads, self.header.tokens - group.start, sizes.dim)
            segments.append(cache_format.load(parts, header, shape, device))
        joined = cache_format.join(segments, [group.rows for group in self.groups]) if len(segments) > 1 else None
        return joined or (segments, None)

    def _other(self, why: str) -> CacheFileError:
        return CacheFileError(
            f"{self.path} was made by another model, {self.header.model.name or 'without a name'} ({why}); "
            "use that one, or compress the prompt again with this one"
        )

    def _wrong(self, what: str) -> CacheFileError:
        return CacheFileError(f"{self.path} is not what rdkv writes: {what}; compress the prompt again")
