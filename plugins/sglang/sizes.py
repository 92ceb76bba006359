"""What prompts take of the arena, and how large that is: from lengths and budgets, on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import torch

from ...kernels.arena import ArenaShape
from ...runtime.budget import head_bits
from ...runtime.config import CompressionConfig
from ...runtime.errors import ConfigError
from .options import ServingOptions


def storage_dtype(dtype: torch.dtype, config: CompressionConfig) -> torch.dtype:
    """Type of what is not quantised: the pool's, or float16 in place of float32 if anything is compressed."""
    return torch.float16 if dtype == torch.float32 and config.budget != 1.0 else dtype


def region_bytes(shape: ArenaShape, config: CompressionConfig, tokens: int) -> int:
    """Bytes of every layer that a prompt of ``tokens`` tokens has for itself."""
    bits = head_bits(config, tokens, shape.dim, shape.heads, shape.layers) * shape.heads
    if shape.dtype == torch.float32:  # which budgets count as if it had 16 bits
        bits *= 2
    return shape.region_bytes(-(-bits // 8))


def rank_config(config: CompressionConfig, heads: int, all_heads: int) -> CompressionConfig:
    """The configuration for ``heads`` of a model's KV heads, which have their part of a budget in bytes."""
    if config.budget_bytes is None or heads == all_heads:
        return config
    return msgspec.structs.replace(config, budget_bytes=config.budget_bytes * heads // all_heads)


def arena_shape(available: int, configurator: Any, config: CompressionConfig, options: ServingOptions) -> ArenaShape:
    """The arena that gets its part of ``available`` bytes, its tables included.

    Raises:
        ConfigError: it is not enough for the tables, or more than there is.
    """
    from sglang.srt.runtime_context import get_parallel, get_schedule

    model = configurator.model_config
    empty = ArenaShape(
        layers=configurator.layer_info.num_effective_layers,
        heads=model.get_num_kv_heads(get_parallel().attn_tp_size),
        dim=model.head_dim,
        dtype=storage_dtype(configurator.kv_cache_dtype, config),
        places=-(-(get_schedule().max_running_requests + 1) // 4) * 4,  # row 0 is SGLang's padding; layers are aligned
        nbytes=0,
    )
    part = options.arena_bytes or int(available * options.arena)
    nbytes = (part // empty.layers - empty.places * empty.table_bytes) // empty.unit * empty.unit
    if nbytes <= 0 or part >= available:
        raise ConfigError(
            f"no room for an arena of {part / 1e9:.3f} GB, with tables for {empty.places - 1} requests, in the "
            f'{available / 1e9:.3f} GB for keys and values: change "arena" or "arena_bytes" in --rdkv-config, '
            "--mem-fraction-static or --max-running-requests"
        )
    return replace(empty, nbytes=nbytes)
