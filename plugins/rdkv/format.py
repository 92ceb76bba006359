"""The cache format ``mixed-bit``: each token's value and each key channel at its own width."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor

from ...kernels.packed import BLOCK, PINNED_START, VALUE_EXPONENT
from ...runtime.errors import ConfigError
from ...runtime.interfaces import CacheFormat, PackedSegment, PluginOptions
from ...runtime.ladder import Distortion, Ladder
from ...runtime.plan import BitPlan
from . import dump
from .pack import begin
from .segment import MixedBitSegment, concatenate_segments, join_segments

VALUE_WIDTHS = (0, 2, 4, 8, 16)
KEY_WIDTHS = (0, 2, 4, 6, 8, 16)

# Normalised squared errors of asymmetric uniform quantisation, values per token (here rotated) and keys per channel.
# `rdkv calibrate` measures them on another model.
DISTORTIONS = {
    # SmolLM2-135M-Instruct: rdkv calibrate --model smollm2-135m
    "smollm2": Distortion(
        value={0: 1.0, 2: 0.1139, 4: 0.00790, 8: 2.75e-5, 16: 0.0},
        key={0: 1.0, 2: 0.3117, 4: 0.01239, 6: 0.00070, 8: 4.29e-5, 16: 0.0},
    ),
    # Llama-3.1-8B, as published with the method (arXiv 2605.08317), which has no keys of 6 bits: those lose the same
    # share of what 4 bits lose as on SmolLM2
    "paper": Distortion(
        value={0: 1.0, 2: 0.3129, 4: 0.01399, 8: 4.86e-5, 16: 0.0},
        key={0: 1.0, 2: 0.1489, 4: 0.00624, 6: 0.00035, 8: 2.18e-5, 16: 0.0},
    ),
}
UNROTATED = {0: 1.0, 2: 0.2608, 4: 0.01038, 8: 3.60e-5, 16: 0.0}  # values of SmolLM2-135M-Instruct without a rotation
CALIBRATIONS = Path(__file__).parent / "calibrations"  # what `rdkv calibrate` writes, by fingerprint
AFFINE_BITS = 32  # scale and zero point, float16 each
COLUMN_BITS = 16  # channel and place of a digit of every key
TABLE_BITS = (VALUE_EXPONENT + 1) * 32 + (PINNED_START + 1) * 64  # a head's counts and starts


class MixedBitOptions(PluginOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of ``mixed-bit``."""

    channel_group: Annotated[
        int, msgspec.Meta(ge=1, le=256, description="key channels that share a width, by falling weight")
    ] = 4
    distortion: Annotated[
        Literal["smollm2", "paper"],
        msgspec.Meta(
            description="losses of each width on a model that was not calibrated: as on SmolLM2, or the paper's"
        ),
    ] = "smollm2"
    rotate: Annotated[
        bool,
        msgspec.Meta(
            description="quantise values under a Hadamard rotation, of which 2 bits lose half as much; a model is "
            "calibrated for itself without it"
        ),
    ] = True
    positions: Annotated[
        bool, msgspec.Meta(description="keep which tokens are held (1 bit a token, 2 a kept one); plan() needs it")
    ] = True


class MixedBit(CacheFormat):
    """Widths 0, 2, 4, 8 and 16, and 6 for keys; ragged per head; bytes to the last scale (see `MixedBitSegment`)."""

    Options = MixedBitOptions
    options: MixedBitOptions

    def ladder(self, head_dim: int, tokens: int, distortion: Distortion | None = None) -> Ladder:
        distortion = distortion or self._distortion
        for what, widths, known in (("values", VALUE_WIDTHS, distortion.value), ("keys", KEY_WIDTHS, distortion.key)):
            if missing := [bits for bits in widths if bits not in known]:
                raise ConfigError(
                    f"format 'mixed-bit': the calibration lacks {what} of {missing[0]} bits; "
                    "measure the model again with `rdkv calibrate`"
                )
        position = 2 if self.options.positions else 0  # bits a coded token, for its width

        def value_cost(bits: int) -> int:
            if bits == 0:
                return 0
            return head_dim * bits + position + AFFINE_BITS

        # Every head's affine parameters of all channels, its tables, and at most: a second column for each digit of 4
        # bits beyond whole blocks of them, columns of 2 bits to whole blocks, the last byte of the classes.
        head_cost = AFFINE_BITS * head_dim + TABLE_BITS + 2 * (BLOCK - 1) * COLUMN_BITS
        if self.options.positions:
            head_cost += -(-tokens // 8) * 8 + 8
        return Ladder(
            head_dim=head_dim,
            value_bits=VALUE_WIDTHS,
            value_distortion=tuple(distortion.value[b] for b in VALUE_WIDTHS),
            value_cost=tuple(value_cost(b) for b in VALUE_WIDTHS),
            key_bits=KEY_WIDTHS,
            key_distortion=tuple(distortion.key[b] for b in KEY_WIDTHS),
            key_cost=KEY_WIDTHS,
            key_overhead=tuple(-(-b // 4) * COLUMN_BITS for b in KEY_WIDTHS),  # a digit has 4 bits, or is all of 2
            pinned_cost=2 * head_dim * 16 + (32 if self.options.positions else 0),
            head_cost=head_cost,
            full_cost=2 * head_dim * 16 * tokens,
            channel_group=min(self.options.channel_group, head_dim),
            token_block=BLOCK,
            key_block=2 * BLOCK,  # whole blocks of nibbles and of 2-bit digits
        )

    @property
    def _distortion(self) -> Distortion:
        """Where the model was not calibrated."""
        known = DISTORTIONS[self.options.distortion]
        if self.options.rotate or self.options.distortion == "paper":  # which had no rotation
            return known
        return Distortion(value=UNROTATED, key=known.key)

    @property
    def variant(self) -> str:
        return "" if self.options.rotate else "unrotated"

    def shipped_calibration(self, fingerprint: str) -> Path | None:
        path = CALIBRATIONS / f"{fingerprint}.json"
        return path if self.options.rotate and path.is_file() else None

    def pack(self, keys: Tensor, values: Tensor, plan: BitPlan) -> PackedSegment:
        return self.begin(keys, values, plan)()

    def begin(self, keys: Tensor, values: Tensor, plan: BitPlan) -> Callable[[], PackedSegment]:
        return begin(keys, values, plan, self.options.rotate, self.options.positions)

    def join(
        self, segments: Sequence[PackedSegment], rows: Sequence[Sequence[int]]
    ) -> tuple[list[PackedSegment], PackedSegment] | None:
        mixed = _all_alike(segments)
        return None if mixed is None else join_segments(mixed, rows)

    def concatenate(self, segments: Sequence[PackedSegment]) -> PackedSegment | None:
        mixed = _all_alike(segments)
        return None if mixed is None else concatenate_segments(mixed)

    def dump(self, segment: PackedSegment) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, header = dump.dump(segment)
        return tensors, msgspec.to_builtins(header)

    def load(
        self,
        tensors: Mapping[str, Tensor],
        header: Mapping[str, Any],
        shape: tuple[int, int, int, int],
        device: torch.device,
    ) -> PackedSegment:
        return dump.load(tensors, msgspec.convert(header, dump.SegmentHeader), shape, device)


def _all_alike(segments: Sequence[PackedSegment]) -> list[MixedBitSegment] | None:
    """Segments that can share tensors; None if they cannot."""
    mixed = [segment for segment in segments if isinstance(segment, MixedBitSegment)]
    # Whole and empty prompts have no packed zone; a float32 model's may need unlike 16-bit types.
    if len(mixed) < len(segments) or len({segment.packed.pinned_keys.dtype for segment in mixed}) > 1:
        return None
    return mixed
