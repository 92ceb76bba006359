"""One layer of a compressed cache: the packed prompt and a 16-bit tail of the tokens after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..kernels import naive
from ..kernels.backends import Backend
from ..kernels.tail import TailBuffer
from .attention import causal_mask, link, plain_attention
from .errors import RdkvError, UnsupportedModelError
from .interfaces import PackedSegment
from .observation import Observation
from .plan import BitPlan
from .session import Group, Session

_SEEN = "_rdkv_tail_seen"
Part = tuple[list[int] | slice | Tensor, PackedSegment]  # rows of a batch, and their packed prompt


class CompressedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Packed segments of the prompt, one for every group of sequences of one length, and the tail.

    ``keys`` and ``values`` are the tail, ``[B, H, n, D]``: every token after the prompt, and the prompt
    itself where nothing was to be compressed. They are views of ``tail``, which has room for more.

    Attributes:
        segments: rows and segment of each group.
        parts: what decoding attends to: a segment of all rows (``slice(None)``), or the groups' segments.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, index: int, session: Session, backend: Backend) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index
        self.session = session
        self.backend = backend
        self.tail: TailBuffer | None = None
        self.segments: list[tuple[list[int], PackedSegment]] = []
        self.parts: list[Part] = []
        self.prompt_tokens = 0  # padding included
        self.packed_tokens = 0  # prompt_tokens, or 0 where the prompt is in the tail

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, dim = key_states.shape
        self.batch_size, self.tail_shape = batch, (batch, heads, 0, dim)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the tokens of one forward pass; the prompt is compressed in `attend`, which has the queries.

        The layer before this one is finished first: see `Session.compress`.
        """
        self.session.enter(self)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return link(key_states, self), value_states
        if self.tail is None:
            raise UnsupportedModelError(
                f"layer {self.index}: the prompt's attention never reached rdkv; call rdkv.attach(model) first"
            )
        self.tail.append(key_states, value_states)
        self.keys, self.values = self.tail.tokens
        return link(self.keys, self), self.values

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attention of this layer, output ``[B, Q, H_q, D]``; compresses the prompt when it is the prompt's."""
        if self.prompt_tokens == 0:
            with self.session.prompt_pass():
                return self._prefill(module, query, key, value, mask, scale)
        if not self.segments:
            key, value = key.to(query.dtype), value.to(query.dtype)
            return plain_attention(module, query, key, value, mask, scale)[0]
        return self._decode(query, key, value, mask, scale)

    def _prefill(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        self.prompt_tokens = self.packed_tokens = key.shape[2]
        groups = self.session.groups(mask, key)
        batch, q_heads, tokens, _ = query.shape
        observations = []
        if len(groups) == 1 and groups[0].start == 0:
            output, _ = plain_attention(module, query, key, value, None, scale)
            observations.append(Observation(key, value, query, scale, self.index))
        else:
            # Sequence by sequence without its padding: what is padded next to it can change nothing.
            output = query.new_zeros(batch, tokens, q_heads, value.shape[-1])
            for group in groups:
                keys, values, queries = (t[group.rows, :, group.start :] for t in (key, value, query))
                output[group.rows, group.start :], _ = plain_attention(module, queries, keys, values, None, scale)
                observations.append(Observation(keys, values, queries, scale, self.index))
        self.session.compress(self, groups, observations)
        return output

    def take(self, observation: Observation) -> None:
        """Compress a prompt without padding that another cache saw pass through this layer (see `Recording`)."""
        with self.session.prompt_pass():
            self.session.enter(self)
            self.lazy_initialization(observation.keys, observation.values)
            self.prompt_tokens = self.packed_tokens = observation.tokens
            self.session.compress(self, self.session.groups(None, observation.keys), [observation])

    def store(
        self, groups: list[Group], segments: list[PackedSegment], joined: PackedSegment | None, dtype: torch.dtype
    ) -> None:
        """Take the packed prompt, and its segments as one if they were joined; the tail starts empty."""
        self.segments = [(group.rows, segment) for group, segment in zip(groups, segments, strict=True)]
        whole = segments[0] if len(segments) == 1 else joined
        self.parts = [*self.segments] if whole is None else [(slice(None), whole)]
        nothing = torch.zeros(2, *self.tail_shape, dtype=dtype, device=self.device)
        self._start_tail(nothing[0], nothing[1])

    def store_whole(self, keys: Tensor, values: Tensor) -> None:
        """Take an uncompressed prompt without padding: the tail holds it, as a plain cache would."""
        self.packed_tokens = 0
        self._start_tail(*(t.clone(memory_format=torch.contiguous_format) for t in (keys, values)))

    def resume(
        self,
        prompt_tokens: int,
        groups: list[Group],
        segments: list[PackedSegment],
        joined: PackedSegment | None,
        tail: tuple[Tensor, Tensor],
    ) -> None:
        """Take a prompt that was compressed before, and what came after it.

        Args:
            prompt_tokens: of the prompt, padding included.
            groups, segments, joined: as for `store`; no segment where nothing was packed.
            tail: keys and values ``[B, H, n, D]`` of all other tokens, the prompt's own where nothing was packed.
        """
        self.lazy_initialization(*tail)
        self.prompt_tokens = self.packed_tokens = prompt_tokens
        if segments:
            self.store(groups, segments, joined, tail[0].dtype)
        else:
            self.store_whole(*(t[:, :, :prompt_tokens] for t in tail))
        assert self.tail is not None
        if self.tail.length < tail[0].shape[2]:
            self.tail.append(*(t[:, :, self.tail.length :] for t in tail))
            self.keys, self.values = self.tail.tokens

    def _start_tail(self, keys: Tensor, values: Tensor) -> None:
        self.tail = TailBuffer(keys, values)
        self.keys, self.values = self.tail.tokens

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Attention over packed segments and tail: at once for one token, or joined by their log-sum-exp."""
        assert self.tail is not None
        new, total = query.shape[2], key.shape[2]
        sees_all = new == 1 and _sees_tail(mask, self.packed_tokens)
        if sees_all and len(self.parts) == 1:
            ((_, whole),) = self.parts
            output, _ = whole.attend_with_tail(query, scale, self.tail.tail, self.backend)
            return output.to(query.dtype).transpose(1, 2).contiguous()
        visible = None
        if not sees_all:
            tail_mask = None if mask is None else mask[:, self.packed_tokens :]
            visible = causal_mask(new, total, tail_mask, query.device)
        output, lse = naive.attention(query, key, value, scale, visible)
        join_parts(output, lse, self.parts, query, scale, self.backend)
        return output.to(query.dtype).transpose(1, 2).contiguous()

    def plan(self) -> BitPlan:
        """Bits of every token and channel, see `CompressedCache.plan`."""
        if self.keys is None:
            raise RdkvError("the cache holds no prompt yet; run the model with it first")
        batch, heads, _, dim = self.tail_shape
        shape = (batch, heads, self.prompt_tokens, dim)
        if not self.segments:
            return BitPlan.uniform(shape, 16, self.device)
        plan = BitPlan.uniform(shape, 0, self.device)
        for rows, segment in self.segments:
            part = segment.plan()
            start = self.prompt_tokens - part.value_bits.shape[-1]
            plan.value_bits[rows, :, start:], plan.pinned[rows, :, start:] = part.value_bits, part.pinned
            plan.key_bits[rows] = part.key_bits
        return plan

    def fork(self, session: Session) -> CompressedLayer:
        """A layer of another cache that holds the same prompt, and no token after it; what is packed is shared."""
        assert self.tail is not None
        layer = CompressedLayer(self.index, session, self.backend)
        layer.dtype, layer.device, layer.is_initialized = self.dtype, self.device, True
        layer.batch_size, layer.tail_shape = self.batch_size, self.tail_shape
        layer.prompt_tokens, layer.packed_tokens = self.prompt_tokens, self.packed_tokens
        layer.segments, layer.parts = self.segments, self.parts
        layer.tail = self.tail.fork()
        layer.keys, layer.values = layer.tail.tokens
        return layer

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the layer holds."""
        for _, segment in (*self.segments, *self.parts):
            yield from segment.tensors()
        if self.tail is not None:
            yield from self.tail.tensors()

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.packed_tokens + (self.tail.length if self.tail is not None else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length that the mask must cover, and its offset."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: the tail grows without bound."""
        return -1

    get_max_cache_shape = get_max_length  # its name in older transformers, which SGLang has

    def reset(self) -> None:
        """Forget everything; the next forward pass is a prompt."""
        self.keys = self.values = self.tail = None
        self.segments, self.parts, self.prompt_tokens, self.packed_tokens, self.is_initialized = [], [], 0, 0, False


def join_parts(output: Tensor, lse: Tensor, parts: list[Part], query: Tensor, scale: float, backend: Backend) -> None:
    """Join attention over a tail, ``output`` ``[B, H_q, Q, D]`` and ``lse`` ``[B, H_q, Q]``, with that over packed
    prompts, each of some rows; in place."""
    for rows, segment in parts:
        packed = segment.attend_with_tail(query[rows], scale, None, backend)
        output[rows], lse[rows] = naive.merge_states(output[rows], lse[rows], *packed)


def _sees_tail(mask: Tensor | None, start: int) -> bool:
    """Whether ``mask`` ``[B, N]`` hides nothing from ``start`` on; asked of the device once for a pass's layers."""
    if mask is None:
        return True
    known: tuple[int, bool] | None = getattr(mask, _SEEN, None)
    if known is None or known[0] != start:
        known = (start, bool(mask[:, start:].all()))
        setattr(mask, _SEEN, known)
    return known[1]
