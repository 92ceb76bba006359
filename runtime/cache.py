"""`CompressedCache`: a transformers cache whose prompt is compressed right after each layer's prefill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from copy import copy
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..kernels.backends import ChosenBackend
from .attention import NAME
from .config import CompressionConfig
from .errors import RdkvError, UnsupportedModelError
from .layer import CompressedLayer
from .plan import BitPlan, Scores
from .session import Session
from .storage import storage_bytes
from .support import check_supported, text_config


class CompressedCache(Cache):
    """A KV cache that holds its prompt at the bits its tokens and channels are worth.

    The first forward pass is the prompt: as soon as a layer's attention output exists, its keys and
    values are scored, allocated, packed and dropped. Tokens of later passes (new tokens, further turns)
    join a 16-bit tail; with ``prefill_chunk_size`` the first chunk is all that is compressed. The model
    must be attached (`rdkv.attach`); a cache serves one conversation, and `fork` makes one for another.

    On a GPU packing is finished when the next layer's keys and values are there, so that it never idles
    while the host waits for it: those of two layers at most exist at 16 bits.

    Bytes are bytes of storages really held, metadata included. The full cache that they are compared
    with stores the same real tokens (no padding) at 16 bits. Prompts of a batch are compressed each on
    its own: neither the other rows nor padding matter.

    Args:
        model_config: ``model.config``.
        config: what to compress with, and the budget.
        keep_scores: keep each layer's scores for `scores` (not counted in ``nbytes``).

    Raises:
        UnsupportedModelError: the model cannot use a compressed cache.
        ConfigError, PluginError: the configuration names or sets something that is not there.
    """

    def __init__(self, model_config: Any, config: CompressionConfig, keep_scores: bool = False) -> None:
        check_supported(model_config)
        self._begin(Session.start(text_config(model_config), config, keep_scores))

    def _begin(self, session: Session) -> None:
        """Be empty."""
        self.model_config = session.model_config
        self.session = session
        self.backend = ChosenBackend(session.config.backend)
        self._token_ids: tuple[tuple[int, ...], ...] | None = None
        layers = [CompressedLayer(i, self.session, self.backend) for i in range(self.model_config.num_hidden_layers)]
        self._compressed = layers
        super().__init__(layers=list(layers))

    @classmethod
    def for_stored(cls, model_config: Any, config: CompressionConfig) -> CompressedCache:
        """A cache to be filled with a stored prompt, for which only the cache format has to be there.

        Raises:
            UnsupportedModelError: the model cannot use a compressed cache.
        """
        check_supported(model_config)
        cache = cls.__new__(cls)
        cache._begin(Session(text_config(model_config), config))
        return cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `Cache.update`; the returned keys carry their layer to rdkv's attention."""
        if self.model_config._attn_implementation != NAME:
            raise UnsupportedModelError(
                f"the model attends with {self.model_config._attn_implementation!r}, which cannot read a compressed "
                "cache; call rdkv.attach(model) first"
            )
        self._recover()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """As `Cache.get_seq_length`."""
        self._recover()
        return int(super().get_seq_length(layer_idx))

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers, under the type that they have here."""
        return self._finished

    @property
    def nbytes(self) -> int:
        """Bytes of every storage that the cache holds now: packed prompt, the tail's buffers, plans of the backend."""
        return storage_bytes(self.tensors())

    def layer_nbytes(self, layer: int) -> int:
        """The part of ``nbytes`` that one layer holds: its packed prompt and tail."""
        return storage_bytes(self._finished[layer].tensors())

    @property
    def full_nbytes(self) -> int:
        """Bytes of a full 16-bit cache with the same tokens, prompt and tail."""
        return self.prompt_full_nbytes + sum(_tail_full_nbytes(layer) for layer in self._finished)

    @property
    def prompt_nbytes(self) -> int:
        """Bytes held for the prompt alone."""
        held = storage_bytes(tensor for layer in self._finished for tensor in layer.tensors())
        return held - sum(_tail_nbytes(layer) for layer in self._finished)

    @property
    def prompt_full_nbytes(self) -> int:
        """Bytes of the prompt in a full 16-bit cache (of 32 bits where a float32 cache was kept as it is)."""
        tokens = sum(self.session.prompt_lengths)
        return sum(tokens * _token_bytes(layer) for layer in self._finished if layer.is_initialized)

    @property
    def retention(self) -> float:
        """``prompt_nbytes / prompt_full_nbytes``; 1 before the first forward pass."""
        full = self.prompt_full_nbytes
        return self.prompt_nbytes / full if full else 1.0

    @property
    def compress_seconds(self) -> float:
        """Seconds spent on scoring, allocating and packing."""
        return self.session.seconds

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence's prompt, without padding; none before the first forward pass."""
        return tuple(self.session.prompt_lengths)

    @property
    def token_ids(self) -> Tensor | None:
        """Tokens that the cache held when it was loaded (`rdkv.load`), ``[B, N]`` int64 where the first layer is.

        What ``generate`` is given has to begin with them. None for a cache that was not loaded.
        """
        if self._token_ids is None:
            return None
        return torch.tensor(self._token_ids, device=self._compressed[0].device)

    def keep_token_ids(self, token_ids: Tensor) -> None:
        """Remember which tokens ``[B, N]`` it was loaded with; on the host, and counted nowhere."""
        self._token_ids = tuple(map(tuple, token_ids.tolist()))

    def plan(self, layer: int) -> BitPlan:
        """Bits of every token and channel of a layer; tokens are aligned on the right, padding has 0 bits.

        Returns:
            ``value_bits`` ``[B, H, T]``, ``key_bits`` ``[B, H, D]``, ``pinned`` ``[B, H, T]``.

        Raises:
            ConfigError: the format was told not to keep positions.
            RdkvError: there is no prompt yet.
        """
        return self._finished[layer].plan()

    def scores(self, layer: int) -> list[Scores]:
        """Scores of a layer, one entry for every group of sequences of one length.

        Raises:
            RdkvError: they were not kept; a file does not hold them.
        """
        if layer not in self.session.scores:
            raise RdkvError(f"layer {layer} has no scores: they are kept with keep_scores=True, and not in a file")
        return self.session.scores[layer]

    @property
    def bits(self) -> dict[str, dict[str, float]]:
        """Share of tokens at each value width (``pinned``: key and value at 16) and of channels at each key width."""
        values: Counter[str] = Counter()
        keys: Counter[str] = Counter()
        padding = 0
        for entry in self._finished:
            plan = self.plan(entry.index)
            batch, heads, tokens = plan.value_bits.shape
            padding += heads * (batch * tokens - sum(self.session.prompt_lengths))
            values["pinned"] += int(plan.pinned.sum())
            for counter, bits in ((values, plan.value_bits[~plan.pinned]), (keys, plan.key_bits)):
                widths, counts = torch.unique(bits, return_counts=True)
                counter.update({str(w): c for w, c in zip(widths.tolist(), counts.tolist(), strict=True)})
        values["0"] -= padding
        return {"value": _shares(values), "key": _shares(keys)}

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the cache holds."""
        for layer in self._finished:
            yield from layer.tensors()
        yield from self.backend.tensors()

    def fork(self) -> CompressedCache:
        """A cache of the same prompt and no token after it, for another conversation about it.

        The packed prompt is shared, each cache has a tail of its own; neither sees what the other is told.

        Raises:
            RdkvError: there is no prompt yet.
        """
        if self.session.failed or not all(layer.tail is not None for layer in self._finished):
            raise RdkvError("the cache holds no prompt yet; run the model with it before fork()")
        fork = copy(self)
        fork.session = self.session.fork()
        fork._compressed = [layer.fork(fork.session) for layer in self._compressed]
        fork.layers = list(fork._compressed)
        if self._token_ids is not None:
            fork._token_ids = tuple(ids[: fork._compressed[0].prompt_tokens] for ids in self._token_ids)
        return fork

    def reset(self) -> None:
        """Forget everything; the next forward pass is a prompt."""
        self.session.reset()
        self._token_ids = None
        super().reset()  # type: ignore[no-untyped-call]

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        """Refused: beam search would need a copy of the packed prompt for every beam."""
        _refuse("beam search")

    def activate_past_recording(self) -> NoReturn:
        """Refused: assisted decoding rolls tokens back."""
        _refuse("assisted decoding")

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused: packed tokens cannot be taken back."""
        _refuse("cropping the cache")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Refused, as `reorder_cache`."""
        _refuse("repeating the rows of a filled cache")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        """Refused, as `reorder_cache`."""
        _refuse("selecting rows of a filled cache")

    @property
    def _finished(self) -> list[CompressedLayer]:
        """The layers; none of them is being packed."""
        self.session.finish()
        return self._compressed

    def _recover(self) -> None:
        """Drop what a prompt left whose pass an error cut short."""
        if self.session.failed:
            self.reset()


def _tail_full_nbytes(layer: CompressedLayer) -> int:
    """Bytes of the tokens after the prompt in a full cache."""
    if layer.tail is None:
        return 0
    return int(layer.batch_size * (layer.tail.length - layer.tail.first) * _token_bytes(layer))


def _tail_nbytes(layer: CompressedLayer) -> int:
    """Bytes held for the tokens after the prompt, the room for more of them included."""
    if layer.tail is None:
        return 0
    return storage_bytes(layer.tail.tensors()) - int(layer.batch_size * layer.tail.first * _token_bytes(layer))


def _token_bytes(layer: CompressedLayer) -> int:
    """Bytes of one token in a full cache of the layer's storage type."""
    _, heads, _, dim = layer.tail_shape
    itemsize = layer.keys.dtype.itemsize if layer.keys is not None else 2
    return 2 * heads * dim * itemsize


def _shares(counts: Counter[str]) -> dict[str, float]:
    total = sum(counts.values())
    order = sorted(counts, key=lambda width: (not width.isdigit(), int(width) if width.isdigit() else 0))
    return {width: counts[width] / total for width in order if counts[width]}


def _refuse(what: str) -> NoReturn:
    raise UnsupportedModelError(f"{what} is not possible with a compressed cache; use greedy search or sampling")
