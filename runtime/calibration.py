"""What a cache format loses on a model at each bit-width and in each head, and where the next run finds it."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import ConfigError
from .home import home, write_file
from .ladder import Distortion
from .support import cache_sizes, model_window

if TYPE_CHECKING:
    from torch import Tensor

    from .interfaces import CacheFormat
    from .loading import LoadedModel

# What decides a model's shape. A list of what counts, rather than of what does not, stays the same when
# a new version of transformers adds fields to its configurations.
FINGERPRINT_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_parameters",
)
Shipped = Callable[[str], Path | None]  # the file of a fingerprint, if there is one
BASE = 256  # whole numbers up to this are exact in every 16-bit float


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A calibration file.

    Attributes:
        format: name of the cache format, and of its variant (`calibrated_name`).
        fingerprint: of the model's configuration, see `fingerprint`.
        model: what the model was called when it was measured.
        text: where the prompt came from.
        tokens: its length, without ``skipped``.
        skipped: first tokens left out, as a scorer pins them outside the quantiser.
        distortion: normalised squared error at each width.
        heads: for each layer, share of each KV head in what compression costs the model's answers (`sensitivity`);
            none if it was not measured.
    """

    format: str
    fingerprint: str
    model: str
    text: str
    tokens: int
    skipped: int
    distortion: Distortion
    heads: tuple[tuple[float, ...], ...] = ()

    @property
    def layers(self) -> tuple[float, ...]:
        """Share of each layer, that of its heads together, ``[L]``; none if it was not measured."""
        return tuple(map(sum, self.heads))


def fingerprint(config: Any) -> str:
    """16 hexadecimal digits for the shape of a model, alike for every dtype and place it is loaded from.

    Models of one shape share it, fine-tuned ones with their base.
    """
    text_config = config.get_text_config()
    fields = {name: getattr(text_config, name, None) for name in FINGERPRINT_FIELDS}
    return hashlib.sha256(msgspec.json.encode(fields, order="sorted")).hexdigest()[:16]


def calibration_path(config: Any, format_name: str) -> Path:
    """Where the calibration of a format on a model is kept."""
    return home() / "calibration" / f"{format_name}-{fingerprint(config)}.json"


def calibrated_name(format_name: str, cache_format: CacheFormat) -> str:
    """What calibrations of a format with its options go by."""
    return f"{format_name}-{cache_format.variant}" if cache_format.variant else format_name


def load_calibration(config: Any, format_name: str, setting: str, shipped: Shipped | None = None) -> Calibration | None:
    """What was measured of a format on a model.

    Args:
        config: the model's configuration.
        format_name: name of the cache format.
        setting: ``auto`` takes what was measured on this model here, or else what the format brings along for it, if
            anything; ``none`` nothing; anything else is the path of a calibration file.
        shipped: gives the file that the format brings along for a fingerprint, or None.

    Raises:
        ConfigError: the file cannot be read, is damaged, or belongs to another format.
    """
    if setting == "none":
        return None
    path = _measured(config, format_name, shipped) if setting == "auto" else Path(setting).expanduser()
    if path is None:
        return None
    try:
        calibration = msgspec.json.decode(path.read_bytes(), type=Calibration)
    except OSError as error:
        raise ConfigError(f"cannot read the calibration {path}: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a calibration file ({error}); `rdkv calibrate` writes one") from error
    if calibration.format != format_name:
        raise ConfigError(f"{path} calibrates the format {calibration.format}, not {format_name}")
    for table in (calibration.distortion.value, calibration.distortion.key):
        _check_losses(table.items(), "distortion at {} bits", path)
    _check_heads(calibration.heads, config, path)
    return calibration


def _check_heads(heads: tuple[tuple[float, ...], ...], config: Any, path: Path) -> None:
    layers, count, _ = cache_sizes(config)
    if heads and (len(heads), {len(row) for row in heads}) != (layers, {count}):
        raise ConfigError(
            f"{path}: it has shares of {len(heads)} layers of {len(heads[0])} heads, the model has {layers} of {count}"
        )
    for layer, row in enumerate(heads):
        _check_losses(enumerate(row), f"share of layer {layer}, head {{}}", path)


def _measured(config: Any, format_name: str, shipped: Shipped | None) -> Path | None:
    """The file of what was measured on this model, here or by who made the format."""
    path = calibration_path(config, format_name)
    if path.is_file():
        return path
    return shipped(fingerprint(config)) if shipped else None


def _check_losses(losses: Iterable[tuple[int, float]], what: str, path: Path) -> None:
    for which, loss in losses:
        if not (math.isfinite(loss) and loss >= 0):
            raise ConfigError(f"{path}: the {what.format(which)} is {loss}; it must be at least 0")


def save_calibration(calibration: Calibration, config: Any) -> Path:
    """Write the file that `load_calibration` finds with ``auto``; returns its path."""
    path = calibration_path(config, calibration.format)
    write_file(path, msgspec.json.format(msgspec.json.encode(calibration)) + b"\n")
    return path


def python_reference() -> str:
    """The Python language reference: some 700 kB of English with code that every Python carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def calibrate(
    loaded: LoadedModel,
    cache_format: CacheFormat,
    format_name: str,
    text: str,
    source: str,
    tokens: int = 2048,
    skipped: int = 4,
    prompts: int = 12,
) -> Calibration:
    """Measure ``cache_format`` on the keys and values that the model makes of a text, and what each head costs it.

    Args:
        loaded: the model; rdkv's attention stays attached where heads are measured.
        cache_format, format_name: what to measure.
        text, source: a prompt, and a word for where it came from.
        tokens: read at most this many at once.
        skipped: leave out this many first tokens: sinks, which the default scorer pins.
        prompts: of the text, to measure heads on (`sensitivity`); 0 leaves them out.

    Raises:
        ConfigError: the text is too short.
    """
    import torch
    from transformers import DynamicCache

    from .sensitivity import sensitivity

    longest = min(tokens, model_window(loaded.model.config) or tokens)
    ids = loaded.tokenizer(text, add_special_tokens=True, verbose=False).input_ids[:longest]
    if len(ids) < skipped + 2:
        raise ConfigError(f"the text has {len(ids)} tokens; a calibration needs at least {skipped + 2}")
    cache = DynamicCache(config=loaded.model.config)
    with torch.inference_mode():
        loaded.model(torch.tensor([ids], device=loaded.device), past_key_values=cache, logits_to_keep=1)
        filled: list[Any] = list(cache.layers)
        layers = [measure(one.keys[:, :, skipped:], one.values[:, :, skipped:], cache_format) for one in filled]
    return Calibration(
        format=calibrated_name(format_name, cache_format),
        fingerprint=fingerprint(loaded.model.config),
        model=loaded.name,
        text=source,
        tokens=len(ids) - skipped,
        skipped=skipped,
        distortion=Distortion(value=_mean([d.value for d in layers]), key=_mean([d.key for d in layers])),
        heads=sensitivity(loaded, text, longest, prompts) if prompts else (),
    )


def measure(keys: Tensor, values: Tensor, cache_format: CacheFormat) -> Distortion:
    """Normalised squared error of one layer at every width, the mean over its heads.

    Keys are measured against their spread around each channel's mean, which a 0-bit channel keeps, and
    values against their energy. Widths 0 and 16 are 1 and 0 by definition.

    Args:
        keys, values: ``[B, H, T, D]``.
        cache_format: packs and unpacks them, everything but what is measured at 16 bits.
    """
    import torch

    from .storage import half_dtype

    if keys.dtype == torch.float32:  # stored as a cache of this model is
        dtype = half_dtype(keys, values)
        keys, values = keys.to(dtype), values.to(dtype)
    ladder = cache_format.ladder(keys.shape[-1], keys.shape[2])
    # A segment may keep its tokens in any order; their positions travel in the half that is not measured.
    labels = _labels(keys)
    centred = keys.float() - keys.float().mean(2, keepdim=True)
    value, key = {}, {}
    for width in ladder.value_bits:
        restored = _round_trip(cache_format, labels, values, width, measured="value") if 0 < width < 16 else None
        value[width] = _loss(width, restored, values, values.float())
    for width in ladder.key_bits:
        restored = _round_trip(cache_format, keys, labels, width, measured="key") if 0 < width < 16 else None
        key[width] = _loss(width, restored, keys, centred)
    return Distortion(value=value, key=key)


def _loss(width: int, restored: Tensor | None, original: Tensor, signal: Tensor) -> float:
    if restored is None:
        return 1.0 if width == 0 else 0.0
    error = (restored - original.float()).square().sum((2, 3)).double()  # [B, H]
    energy = signal.square().sum((2, 3)).double()
    return float((error / energy.clamp_min(1e-30)).mean())


def _round_trip(cache_format: CacheFormat, keys: Tensor, values: Tensor, width: int, measured: str) -> Tensor:
    """What comes back of ``keys`` or ``values`` (the other holds `_labels`), in order of position."""
    import torch

    from .plan import BitPlan

    batch, heads, tokens, dim = keys.shape
    plan = BitPlan(
        value_bits=keys.new_full((batch, heads, tokens), width if measured == "value" else 16, dtype=torch.uint8),
        key_bits=keys.new_full((batch, heads, dim), width if measured == "key" else 16, dtype=torch.uint8),
        pinned=keys.new_zeros((batch, heads, tokens), dtype=torch.bool),
    )
    unpacked_keys, unpacked_values, present = cache_format.pack(keys, values, plan).unpack()
    label, restored = (unpacked_keys, unpacked_values) if measured == "value" else (unpacked_values, unpacked_keys)
    position = (label[..., 0] * BASE + label[..., 1]).round().long()
    position = torch.where(present, position, tokens)  # empty slots go past the end
    order = position.argsort(dim=-1)[..., :tokens, None].expand(-1, -1, -1, dim)
    return restored.gather(2, order)


def _labels(like: Tensor) -> Tensor:
    """A tensor such as ``like`` whose first two channels spell the position in numbers exact at 16 bits."""
    import torch

    labels = torch.zeros_like(like)
    position = torch.arange(like.shape[2], device=like.device)
    labels[..., 0] = (position // BASE).to(like.dtype)
    labels[..., 1] = (position % BASE).to(like.dtype)
    return labels


def _mean(tables: list[dict[int, float]]) -> dict[int, float]:
    return {width: statistics.fmean(t[width] for t in tables) for width in tables[0]}
