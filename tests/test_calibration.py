"""Measured distortions, against the same quantities by hand, and the file that keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from calibrations import written
from torch import Tensor
from transformers import LlamaConfig

from rdkv import CompressionConfig
from rdkv.plugins.rdkv.format import MixedBit, MixedBitOptions
from rdkv.runtime.calibration import (
    Calibration,
    calibrate,
    calibration_path,
    fingerprint,
    load_calibration,
    measure,
    python_reference,
    save_calibration,
)
from rdkv.runtime.errors import ConfigError
from rdkv.runtime.interfaces import CacheFormat, PackedSegment
from rdkv.runtime.ladder import Distortion, Ladder
from rdkv.runtime.loading import load_model
from rdkv.runtime.pipeline import Pipeline
from rdkv.runtime.plan import BitPlan

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
}
LOSSES = Distortion(value={0: 1.0, 2: 0.3, 16: 0.0}, key={0: 1.0, 2: 0.2, 16: 0.0})


class Shuffled(PackedSegment):
    """Keys and values as they came but in another order, the last slot of each head empty."""

    def __init__(self, keys: Tensor, values: Tensor, plan: BitPlan) -> None:
        order = torch.randperm(keys.shape[2])
        pad = (0, 0, 0, 1)
        self.keys = torch.nn.functional.pad(keys[:, :, order], pad)
        self.values = torch.nn.functional.pad(values[:, :, order], pad)
        self.packed_with = plan

    def attend(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        present = torch.ones(self.keys.shape[:3], dtype=torch.bool)
        present[..., -1] = False
        return self.keys.float(), self.values.float(), present

    def plan(self) -> BitPlan:
        return self.packed_with

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.keys, self.values)


class Halving(CacheFormat):
    """A format whose 4 bits halve every number that they hold: a normalised squared error of 1/4."""

    def ladder(self, head_dim: int, tokens: int, distortion: Distortion | None = None) -> Ladder:
        widths, losses = (0, 4, 16), (1.0, 0.25, 0.0)
        return Ladder(head_dim, widths, losses, widths, widths, losses, widths, widths, 1, 1, 1)

    def pack(self, keys: Tensor, values: Tensor, plan: BitPlan) -> PackedSegment:
        key_factor = torch.where(plan.key_bits == 4, 0.5, 1.0)[:, :, None, :]
        value_factor = torch.where(plan.value_bits == 4, 0.5, 1.0)[..., None]
        return Shuffled((keys * key_factor).to(keys.dtype), (values * value_factor).to(values.dtype), plan)


def random_layer(tokens: int = 300, heads: int = 2, dim: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, tokens, dim, generator=generator).half() for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_order_of_slots_does_not_matter(dtype: torch.dtype) -> None:
    keys, values = (t.to(dtype) for t in random_layer())
    keys = keys - keys.float().mean(2, keepdim=True).to(dtype)
    distortion = measure(keys, values, Halving())
    assert distortion.value[4] == pytest.approx(0.25, rel=1e-3)
    assert distortion.key[4] == pytest.approx(0.25, rel=1e-2)
    assert (distortion.value[0], distortion.value[16]) == (1.0, 0.0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_against_uniform_quantisation_by_hand(bits: int) -> None:
    keys, values = random_layer()
    keys += 3.0  # a mean that costs nothing must not count as signal

    def loss(x: Tensor, axis: int, signal: Tensor) -> float:
        low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
        step = (high - low) / (2**bits - 1)
        error = ((x - low) / step).round() * step + low - x
        return float((error.square().sum((2, 3)) / signal.square().sum((2, 3))).mean())

    measured = measure(keys, values, MixedBit())
    k, v = keys.float(), values.float()
    assert measured.value[bits] == pytest.approx(loss(v, 3, v), rel=0.05)
    assert measured.key[bits] == pytest.approx(loss(k, 2, k - k.mean(2, keepdim=True)), rel=0.05)


def test_more_bits_lose_less() -> None:
    measured = measure(*random_layer(), MixedBit())
    for table in (measured.value, measured.key):
        losses = [table[width] for width in sorted(table)]
        assert losses == sorted(losses, reverse=True)
        assert losses[0] == 1.0
        assert losses[-1] == 0.0


def test_calibrate_and_load(tiny_folder: Path) -> None:
    loaded = load_model(str(tiny_folder), "cpu")
    config = loaded.model.config
    assert load_calibration(config, "mixed-bit", "auto") is None
    made = calibrate(loaded, MixedBit(), "mixed-bit", python_reference(), "reference", tokens=400, prompts=1)
    assert (made.tokens, made.skipped) == (396, 4)
    assert [len(row) for row in made.heads] == [config.num_key_value_heads] * config.num_hidden_layers
    assert sum(map(sum, made.heads)) == pytest.approx(1.0)
    path = save_calibration(made, config)
    assert path == calibration_path(config, "mixed-bit")
    assert load_calibration(config, "mixed-bit", "auto") == made
    assert load_calibration(config, "mixed-bit", str(path)) == made
    assert load_calibration(config, "mixed-bit", "none") is None
    assert load_calibration(config, "other", "auto") is None


def test_variants_of_a_format_are_calibrated_apart(tiny_folder: Path) -> None:
    loaded, unrotated = load_model(str(tiny_folder), "cpu"), MixedBit(MixedBitOptions(rotate=False))
    config = loaded.model.config
    made = calibrate(loaded, unrotated, "mixed-bit", python_reference(), "reference", tokens=100, prompts=0)
    assert made.format == "mixed-bit-unrotated"
    path = save_calibration(made, config)
    assert load_calibration(config, "mixed-bit", "auto") is None
    found = [
        Pipeline(config, CompressionConfig(budget=0.1, format_options={"rotate": rotate})).distortion
        for rotate in (True, False)
    ]
    assert found == [None, made.distortion]
    with pytest.raises(ConfigError, match="calibrates the format mixed-bit-unrotated, not mixed-bit"):
        Pipeline(config, CompressionConfig(budget=0.1, calibration=str(path)))
    assert unrotated.shipped_calibration(load_shipped().fingerprint) is None


def test_without_prompts_heads_are_left_out(tiny_folder: Path) -> None:
    loaded = load_model(str(tiny_folder), "cpu")
    made = calibrate(loaded, MixedBit(), "mixed-bit", python_reference(), "reference", tokens=100, prompts=0)
    assert (made.tokens, made.heads) == (96, ())


def test_what_was_measured_here_goes_before_what_the_format_brings_along(tmp_path: Path) -> None:
    config = LlamaConfig()
    asked = []

    def shipped(name: str) -> Path | None:
        asked.append(name)
        return Path(written(tmp_path / "shipped.json", model="shipped"))

    found = load_calibration(config, "mixed-bit", "auto", shipped)
    assert found is not None
    assert found.model == "shipped"
    assert asked == [fingerprint(config)]
    assert load_calibration(config, "mixed-bit", "none", shipped) is None
    assert load_calibration(config, "mixed-bit", "auto", lambda _: None) is None
    made = msgspec.structs.replace(found, model="here")
    save_calibration(made, config)
    assert load_calibration(config, "mixed-bit", "auto", shipped) == made


def load_shipped() -> Calibration:
    found = load_calibration(LlamaConfig(**SMOLLM2), "mixed-bit", "auto", MixedBit().shipped_calibration)
    assert found is not None
    return found


def test_the_shipped_calibration_of_smollm2_is_found_by_its_shape() -> None:
    found = load_shipped()
    assert found.fingerprint == fingerprint(LlamaConfig(**SMOLLM2))
    assert [len(row) for row in found.heads] == [3] * 30
    assert MixedBit().shipped_calibration("0" * 16) is None


def test_short_text(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="has 3 tokens; a calibration needs at least 6"):
        calibrate(load_model(str(tiny_folder), "cpu"), MixedBit(), "mixed-bit", "abc", "x")


def test_python_reference_is_long() -> None:
    assert len(python_reference()) > 300_000


def test_fingerprint_depends_on_shape_alone(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4}
    config = LlamaConfig(**shape)
    same: Any = LlamaConfig(**shape, dtype="bfloat16", attn_implementation="sdpa")
    same.transformers_version, same._name_or_path = "0.0", "elsewhere"
    assert fingerprint(config) == fingerprint(same)
    same.save_pretrained(tmp_path)
    assert fingerprint(config) == fingerprint(LlamaConfig.from_pretrained(tmp_path))
    for change in ({"num_hidden_layers": 3}, {"hidden_size": 128}, {"rope_parameters": {"rope_theta": 5.0}}):
        assert fingerprint(config) != fingerprint(LlamaConfig(**(shape | change)))


def test_bad_files(tmp_path: Path) -> None:
    def message(setting: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_calibration(LlamaConfig(), "mixed-bit", setting)
        assert setting in str(caught.value)
        return str(caught.value)

    assert "No such file" in message(str(tmp_path / "none.json"))
    damaged = tmp_path / "damaged.json"
    damaged.write_bytes(b'{"format": "mixed-bit"')
    assert "is not a calibration file" in message(str(damaged))
    damaged.write_bytes(b"\xff\xfe")
    assert "is not a calibration file" in message(str(damaged))
    assert "calibrates the format other" in message(written(tmp_path / "a.json", format="other"))
    negative = Distortion(value={2: -1.0}, key={})
    assert "at 2 bits is -1.0" in message(written(tmp_path / "b.json", distortion=negative))
    heads = ((0.1,) * LlamaConfig().num_key_value_heads,) * LlamaConfig().num_hidden_layers
    few, ragged = heads[:1], (heads[0][:5], *heads[1:])
    assert "1 layers of 32 heads, the model has 32 of 32" in message(written(tmp_path / "c.json", heads=few))
    assert "32 layers of 5 heads, the model has 32 of 32" in message(written(tmp_path / "d.json", heads=ragged))
    negative_share = (*heads[:7], (0.1, -1.0, *heads[0][2:]), *heads[8:])
    assert "share of layer 7, head 1 is -1.0" in message(written(tmp_path / "e.json", heads=negative_share))
