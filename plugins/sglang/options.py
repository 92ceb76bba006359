"""What ``--rdkv-config`` takes: the fields of a compression, and those of serving."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from ...runtime.config import CompressionConfig, config_from_mapping
from ...runtime.errors import ConfigError

DEFAULT_WINDOW = 64  # queries kept for a scorer that does not say how many it uses
Share = Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class ServingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How compressed prompts are served.

    Attributes:
        arena: share of the memory for keys and values (``--mem-fraction-static`` less the weights) that holds
            compressed prompts; the rest is SGLang's pool, for prompts being read and for new tokens.
        arena_bytes: the same in bytes, over all layers.
        min_tokens: shorter prompts stay as they are, in SGLang's pool.
        prefill: SGLang's attention backend for prompts; by default ``triton``, and ``torch_native`` on a CPU.
    """

    arena: Share = 0.5
    arena_bytes: Count | None = None
    min_tokens: Count = 256
    prefill: str | None = None


class ServingConfig(msgspec.Struct, frozen=True):
    """What compresses, and how that is served."""

    compression: CompressionConfig
    options: ServingOptions


def parse(text: str | None) -> ServingConfig:
    """The configuration in JSON ``text``, fields of `rdkv.CompressionConfig` and of `ServingOptions` side by side.

    Raises:
        ConfigError: no configuration, no JSON object, or a field that is not there or out of range.
    """
    if not text:
        raise ConfigError("--attention-backend rdkv needs --rdkv-config, such as --rdkv-config '{\"budget\": 0.05}'")
    try:
        values = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"--rdkv-config is not a JSON object: {error}") from error
    own = {name: values.pop(name) for name in ServingOptions.__struct_fields__ if name in values}
    try:
        options = msgspec.convert(own, ServingOptions)
    except msgspec.ValidationError as error:
        raise ConfigError(f"--rdkv-config: {error}") from error
    return ServingConfig(config_from_mapping(values), options)
