"""kvpress: a press runs on the model as in its own pipeline, at the ratio that leaves what the budget allows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache as cached
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

import rdkv

from ..method import Compressed, Prompt, full_nbytes
from .held import allocated, needed
from .masked import masked_cache
from .presses import find
from .quantized import Quantizer
from .shape import Shape


@dataclass(frozen=True)
class Pressed:
    """A press of kvpress, its result held as it is, or quantised by transformers.

    Attributes:
        name: in records and tables.
        press: one of `presses.find`.
        options: of the press.
        quantizer: of the `QuantizedCache` that takes what is left; none for 16 bits.
    """

    name: str
    press: str
    options: dict[str, Any] = field(default_factory=dict)
    quantizer: Quantizer | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method`."""
        settings = {"peer": f"kvpress {version('kvpress')}", "press": self.press, **self.options}
        return settings if self.quantizer is None else {**settings, **self.quantizer.settings}

    @contextmanager
    def compress(self, prompt: Prompt, budget: float) -> Iterator[Compressed]:
        """See `Method`; the prompts are read anew, since a press wants hidden states."""
        shape, full = Shape.of(prompt), full_nbytes(prompt)
        share, multiple = 1.0, 1
        if self.quantizer is not None:
            share, multiple = self.quantizer.pair_share, self.quantizer.multiple(shape)
        press = find(self.press, self.options).fit(shape, int(budget * full), share * shape.pair_bytes, multiple)
        cache = self._read(press, prompt)
        nbytes, held = needed(cache, shape), allocated(cache)
        if nbytes > budget * full:
            raise rdkv.BudgetError(f"{self.name} takes {nbytes} bytes of {full}, the budget is {budget:.2%}")
        yield Compressed(cache, nbytes, full, allocated_nbytes=held if held > nbytes else None)

    @torch.no_grad()
    def _read(self, press: Any, prompt: Prompt) -> Cache:
        # One prompt at a time: KVzip takes no batch.
        rows = [DynamicCache() for _ in prompt.ids]
        evicted = [press_rows(press, prompt.model, ids[None], row) for ids, row in zip(prompt.ids, rows, strict=True)]
        whole = DynamicCache()
        for index, parts in enumerate(zip(*(row.layers for row in rows), strict=True)):
            whole.update(torch.cat([p.keys for p in parts]), torch.cat([p.values for p in parts]), index)
        masks = [torch.cat(masks) for masks in zip(*(masks for masks in evicted if masks), strict=True)]
        if self.quantizer is None:
            return masked_cache(whole, masks) if masks else whole
        if masks:
            raise rdkv.ConfigError(f"{self.name}: the press {self.press} masks, and a quantised cache has no mask")
        quantised = self.quantizer.cache(prompt.recording.model_config)
        left: list[Any] = list(whole.layers)
        for index, layer in enumerate(left):
            self.quantizer.fill(quantised, index, layer.keys, layer.values)
        return quantised


def press_rows(press: Any, model: PreTrainedModel, ids: Tensor, cache: Cache) -> list[Tensor]:
    """Read prompts ``ids`` ``[B, T]`` into ``cache`` under a press.

    Returns:
        Which tokens of each layer it masks, ``[B, H, T]`` bool; nothing if it masks none.
    """
    tokens = ids.shape[1]
    layers: list[Any] = [layer.self_attn for layer in model.model.layers]
    try:
        with untemplated(model) if type(press).__name__ == "KVzipPress" else nullcontext(), press(model):
            # Hooks of kvpress want to be told positions, which transformers no longer hands to every layer.
            positions = torch.arange(tokens, device=ids.device)
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, cache_position=positions)
        indices: list[Any] = [getattr(layer, "masked_key_indices", None) for layer in layers]
    finally:
        for layer in layers:
            layer.__dict__.pop("masked_key_indices", None)  # kvpress's attention would act on it in the next prompt
    if all(index is None for index in indices):
        return []
    held: list[Any] = list(cache.layers)
    masks = [torch.zeros(layer.keys.shape[:3], dtype=torch.bool, device=ids.device) for layer in held]
    for mask, index in zip(masks, indices, strict=True):
        mask[tuple(part.to(ids.device) for part in index)] = True
    return masks


@contextmanager
def untemplated(model: PreTrainedModel) -> Iterator[None]:
    """KVzip looks up the model's tokenizer and takes every prompt to begin as its chat template does; ours do not."""
    before = model.config.name_or_path
    if before:
        model.config.name_or_path = _untemplated_tokenizer(before).name
    try:
        yield
    finally:
        model.config.name_or_path = before


@cached
def _untemplated_tokenizer(source: str) -> tempfile.TemporaryDirectory[str]:
    """A folder with the tokenizer of ``source`` and no chat template, until the program ends."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = None
    folder = tempfile.TemporaryDirectory(prefix="rdkv-tokenizer-")
    tokenizer.save_pretrained(folder.name)
    return folder
