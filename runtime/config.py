"""Configuration of a compression: one msgspec Struct, the same from Python, TOML and flags."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from .errors import ConfigError

BudgetBy = Literal["head", "layer", "even"]
BackendName = Literal["auto", "torch", "triton", "flashinfer"]


class CompressionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What compresses a prompt's cache, and how far.

    Exactly one budget counts: ``budget_tokens`` or ``budget_bytes`` if given, else ``budget``.

    Attributes:
        scorer, allocator, format: names that ``rdkv plugins`` lists.
        budget: fraction of the bytes of a full 16-bit cache, in (0, 1].
        budget_tokens: bytes of this many whole 16-bit tokens a head.
        budget_bytes: bytes of one sequence over all layers.
        scorer_options, allocator_options, format_options: fields of the plugin's options.
        plugins: modules to load besides installed plugins, as ``-p`` does.
        calibration: ``auto`` takes what ``rdkv calibrate`` measured on this model if it did, ``none``
            the format's own distortions; anything else is the path of a calibration file.
        budget_by: what bytes are given by. ``head`` gives more to the layers that answers depend on more, and within a
            layer to such heads, as measured with the calibration (`runtime.budget.layer_shares`, ``head_weights``);
            ``layer`` to such layers alone; ``even``, or no such measurement, to none. Where an allocator keeps every
            token all layers have the same.
        backend: what computes decode attention. ``auto`` is the fastest that works (``rdkv plugins`` says why);
            one that does not work gives way to it, with a message.

    Raises:
        ConfigError: a value out of range, or two budgets at once.
    """

    scorer: str = "attention-distortion"
    allocator: str = "waterfill"
    format: str = "mixed-bit"
    budget: float | None = None
    budget_tokens: int | None = None
    budget_bytes: int | None = None
    scorer_options: dict[str, Any] = {}
    allocator_options: dict[str, Any] = {}
    format_options: dict[str, Any] = {}
    plugins: tuple[str, ...] = ()
    calibration: str = "auto"
    budget_by: BudgetBy = "head"
    backend: BackendName = "auto"

    def __post_init__(self) -> None:
        given = [n for n in ("budget", "budget_tokens", "budget_bytes") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigError(f"{given[0]} and {given[1]} are both set; set one of them")
        if not given:
            raise ConfigError("no budget: set budget (a fraction), budget_tokens or budget_bytes")
        value = getattr(self, given[0])
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"{given[0]} is {value!r}; it must be a finite number")
        if given[0] == "budget" and not 0 < value <= 1:
            raise ConfigError(f"budget is {value}; it is a fraction of the full cache's bytes, above 0 and at most 1")
        if given[0] != "budget" and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{given[0]} is {value}; it must be a whole number of at least 1")
        if self.budget_by not in get_args(BudgetBy):
            raise ConfigError(f"budget_by is {self.budget_by!r}; it must be one of {', '.join(get_args(BudgetBy))}")
        if self.backend not in get_args(BackendName):
            raise ConfigError(f"backend is {self.backend!r}; it must be one of {', '.join(get_args(BackendName))}")

    @property
    def choices(self) -> dict[str, Any]:
        """What compresses and how much, by the names that reports have for it."""
        names = ("scorer", "allocator", "format", "budget", "budget_tokens", "budget_bytes")
        return {name: getattr(self, name) for name in names}


def config_from_mapping(values: Mapping[str, Any]) -> CompressionConfig:
    """A configuration from plain values, with an error that names the field at fault."""
    try:
        return msgspec.convert(dict(values), CompressionConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"configuration: {error}") from error


def read_toml(path: str | Path) -> dict[str, Any]:
    """The table of a TOML file, its keys spelled as flags are (``-`` and ``_`` alike)."""
    try:
        table = msgspec.toml.decode(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: expected a table of settings")
    return {str(key).replace("-", "_"): value for key, value in table.items()}
