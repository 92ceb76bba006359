"""What is compared: a method compresses a prompt's cache to a budget, and says how many bytes it really holds.

A method is any object with `Method`'s two members: ours (`Ours`), and peers in their own implementations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

import rdkv


@dataclass(frozen=True)
class Prompt:
    """Prompts of one length as a batch, read once with the full cache.

    Attributes:
        model: attached (`rdkv.attach`); with any cache but ours it attends as with ``sdpa``.
        ids: ``[B, T]``, no padding.
        recording: what every layer saw of them, and the full cache.
        logits: ``[B, V]``, for the token after each prompt.
    """

    model: PreTrainedModel
    ids: Tensor
    recording: rdkv.Recording
    logits: Tensor

    @classmethod
    @torch.no_grad()
    def read(cls, model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Prompt:
        """Read prompts of one length with an attached model."""
        ids = torch.tensor([list(row) for row in rows], device=model.device)
        recording = rdkv.Recording(model.config)
        logits = model(ids, past_key_values=recording, use_cache=True, logits_to_keep=1).logits[:, -1]
        return cls(model, ids, recording, logits)


@dataclass(frozen=True)
class Compressed:
    """A compressed prompt.

    Attributes:
        cache: holds the batch's prompts and no token after them. Positions of later tokens are given to the model
            (``position_ids`` from ``T`` on), so its ``get_seq_length()`` may be that of what was kept.
        nbytes: bytes really held for the prompts, metadata and padding included (those of storages, not of codes).
        full_nbytes: bytes of the same prompts in a full 16-bit cache.
        plans: bits of each layer's tokens and channels, for who has such a plan.
        allocated_nbytes: bytes that the implementation at hand allocates, where it only pretends to free (a mask over
            a full cache, channels of zeros) and ``nbytes`` is what its result needs.
    """

    cache: Cache
    nbytes: int
    full_nbytes: int
    plans: Callable[[], list[rdkv.BitPlan]] | None = None
    allocated_nbytes: int | None = None

    @property
    def retention(self) -> float:
        """Share of the full cache's bytes."""
        return self.nbytes / self.full_nbytes

    def fork(self) -> Cache:
        """A cache to continue from, which leaves ``cache`` as it is: its own ``fork()`` if it has one, or a copy."""
        own: Callable[[], Cache] | None = getattr(self.cache, "fork", None)
        return own() if own is not None else copy.deepcopy(self.cache)


class Method(Protocol):
    """Compresses prompts.

    Attributes:
        name: of the method in records and tables.
    """

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what it does but the budget, as JSON has it: a cell is measured anew when they change."""

    def compress(self, prompt: Prompt, budget: float) -> AbstractContextManager[Compressed]:
        """The prompts at ``budget``, a fraction of the full cache's bytes that ``nbytes`` must not exceed.

        ``prompt.recording`` has all keys, values and queries; a method that needs a pass of its own runs
        ``prompt.model`` over ``prompt.ids``. Inside the ``with`` block the model goes on from the cache, and from no
        other method's; whatever was changed about the model is undone at its end.

        Raises:
            rdkv.BudgetError: the method cannot be had within ``budget``; the cell is recorded as such.
        """


@dataclass(frozen=True)
class Ours:
    """A configuration of rdkv.

    Attributes:
        name: in records and tables.
        settings: fields of `rdkv.CompressionConfig` but the budget.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def compress(self, prompt: Prompt, budget: float) -> Iterator[Compressed]:
        """See `Method`; the plan is made from the recorded prompt, which gives what a pass of its own would."""
        cache = prompt.recording.compress(rdkv.CompressionConfig(**self.settings, budget=budget))
        layers = range(len(cache.layers))
        yield Compressed(
            cache, cache.prompt_nbytes, cache.prompt_full_nbytes, lambda: [cache.plan(layer) for layer in layers]
        )


@dataclass(frozen=True)
class Full:
    """The full cache, whatever the budget: what every method is measured against."""

    name: str = "full"
    settings: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def compress(self, prompt: Prompt, budget: float = 1.0) -> Iterator[Compressed]:
        """See `Method`; nothing is compressed."""
        cache: DynamicCache = prompt.recording.full()
        nbytes = full_nbytes(prompt)
        yield Compressed(cache, nbytes, nbytes)


def full_nbytes(prompt: Prompt) -> int:
    """Bytes of the prompts in a full 16-bit cache, for methods that do not know."""
    return sum(2 * (seen.keys.numel() + seen.values.numel()) for seen in prompt.recording.observations)
