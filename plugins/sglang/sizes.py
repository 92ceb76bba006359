"""What prompts take of the arena, and how large that is: from lengths and budgets, on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import torch

from ...kernels.arena_shape import EVEN, ArenaShape
from ...kernels.naive_rotation import span
from ...runtime.budget import layer_bits
from ...runtime.config import CompressionConfig
from ...runtime.errors import ConfigError
from ...runtime.pipeline import Pipeline
from .options import ServingOptions


def storage_dtype(dtype: torch.dtype, config: CompressionConfig) -> torch.dtype:
    """Type of what is not quantised: the pool's, or float16 in place of float32 if anything is compressed."""
    return torch.float16 if dtype == torch.float32 and config.budget != 1.0 else dtype


def needs(shape: ArenaShape, config: CompressionConfig, tokens: int, shares: tuple[float, ...]) -> list[int]:
    """Bytes of each layer that hold any packed prompt of ``tokens`` tokens, ``[L]``, multiples of the arena's unit.

    Args:
        shares: of the layers in the budget, see `runtime.budget.layer_shares`.
    """
    bits = layer_bits(config, tokens, shape.dim, shape.heads, shares)
    scale = 2 if shape.dtype == torch.float32 else 1  # budgets count it as if it had 16 bits
    return [shape.layer_bytes(-(-each * shape.heads * scale // 8)) for each in bits]


def store_shares(
    shape: ArenaShape, config: CompressionConfig, tokens: int, shares: tuple[float, ...]
) -> tuple[int, ...]:
    """Shares of the layers' stores (`ArenaShape.shares`), of which prompts of ``tokens`` tokens leave none unused.

    They are not ``shares`` where a budget would give a layer more than its full cache.
    """
    wanted = needs(shape, config, tokens, shares)
    return tuple(need * len(wanted) * EVEN // sum(wanted) for need in wanted)


def rank_heads(model: Any) -> int:
    """KV heads that this rank has of each layer of SGLang's ``model``, its configuration."""
    from sglang.srt.runtime_context import get_parallel

    return int(model.get_num_kv_heads(get_parallel().attn_tp_size))


def first_head(model: Any) -> int:
    """Which of a layer's KV heads this rank's are, from which one on; ranks beyond one a head have copies."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return int(parallel.attn_tp_rank * model.get_total_num_kv_heads() // parallel.attn_tp_size)


def rank_config(config: CompressionConfig, heads: int, all_heads: int) -> CompressionConfig:
    """The configuration for ``heads`` of a model's KV heads, which have their part of a budget in bytes."""
    if config.budget_bytes is None or heads == all_heads:
        return config
    return msgspec.structs.replace(config, budget_bytes=config.budget_bytes * heads // all_heads)


def arena_shape(available: int, configurator: Any, pipeline: Pipeline, options: ServingOptions) -> ArenaShape:
    """The arena that gets its part of ``available`` bytes, its tables included.

    Raises:
        ConfigError: it is not enough for the tables, or more than there is.
    """
    from sglang.srt.runtime_context import get_schedule

    model = configurator.model_config
    empty = ArenaShape(
        shares=(EVEN,) * pipeline.layers,
        heads=rank_heads(model),
        dim=model.head_dim,
        span=span(model.head_dim) if getattr(pipeline.format.options, "rotate", False) else 1,
        dtype=storage_dtype(configurator.kv_cache_dtype, pipeline.config),
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
    shares = store_shares(empty, pipeline.config, model.context_len, pipeline.shares)
    return replace(empty, shares=shares, nbytes=nbytes)
