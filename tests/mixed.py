"""Plans of the mixed-bit format with keys and values to pack by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from rdkv.plugins.rdkv.format import MixedBit, MixedBitOptions
from rdkv.runtime.interfaces import PackedSegment
from rdkv.runtime.plan import BitPlan

VALUE_WIDTHS = (0, 2, 4, 8, 16)
KEY_WIDTHS = (0, 2, 4, 6, 8, 16)
quick = settings(max_examples=80, deadline=None)


@dataclass(frozen=True)
class Case:
    """Keys, values and the plan to pack them with. Evicted tokens are NaN: nothing of them may be left."""

    keys: Tensor
    values: Tensor
    plan: BitPlan

    @property
    def apart(self) -> Tensor:
        """Tokens stored as they are, before the others: pinned ones, and all of a head whose widths are all 16."""
        plan = self.plan
        whole = ~plan.kept | plan.pinned | (plan.value_bits == 16)
        nothing_to_quantise = whole.all(-1, keepdim=True) & (plan.key_bits == 16).all(-1, keepdim=True)
        return plan.pinned | plan.kept & nothing_to_quantise

    def pack(self, **options: Any) -> PackedSegment:
        return MixedBit(MixedBitOptions(**options)).pack(self.keys, self.values, self.plan)


def make_case(
    value_bits: Tensor, key_bits: Tensor, pinned: Tensor, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Case:
    """Random keys and values for a plan: channels off centre, some constant, pinned tokens outliers."""
    generator = torch.Generator().manual_seed(seed)
    tokens, dim = value_bits.shape[2], key_bits.shape[2]
    keys, values = torch.randn(2, *value_bits.shape, dim, generator=generator)
    offset, spread = torch.randn(2, 1, 1, 1, dim, generator=generator)
    keys = keys * (2 * spread.clamp(-3, 3)).exp() + 10 * offset  # within float16
    keys[..., ::11] = keys[:, :, :1, ::11].expand(-1, -1, tokens, -1)
    keys, values = keys.masked_fill(pinned.unsqueeze(3), 3e4), values.masked_fill(pinned.unsqueeze(3), -3e4)
    evicted = ~pinned & (value_bits == 0)
    keys, values = (t.masked_fill(evicted.unsqueeze(3), float("nan")).to(dtype) for t in (keys, values))
    return Case(keys, values, BitPlan(value_bits.byte(), key_bits.byte(), pinned))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Every width at once, or one for all; heads without tokens; pinned tokens anywhere."""
    batch, heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 14))
    dim = draw(st.sampled_from([5, 32, 64, 80, 96, 128]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)

    def widths(known: tuple[int, ...], count: int) -> Tensor:
        allowed = draw(st.lists(st.sampled_from(known), min_size=1, max_size=5, unique=True))
        pick = torch.randint(len(allowed), (batch, heads, count), generator=generator)
        return torch.tensor(allowed)[pick]

    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))

    value_bits = widths(VALUE_WIDTHS, tokens).masked_fill(some(batch, heads, 1), 0)
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    return make_case(value_bits, widths(KEY_WIDTHS, dim), some(batch, heads, tokens), seed, dtype)


def empty(batch: int, heads: int, tokens: int) -> Tensor:
    return torch.zeros(batch, heads, tokens, dtype=torch.bool)


ALL_WIDTHS = make_case(
    torch.tensor([[[16, 2, 0, 8, 4, 2, 16], [0, 0, 0, 4, 0, 0, 0]]]),
    torch.tensor(KEY_WIDTHS)[torch.arange(64) % 6].reshape(1, 2, 32),
    torch.tensor([[[True, False, False, False, False, True, False], [False] * 7]]),
)
ONE_TOKEN = make_case(torch.full((1, 1, 1), 2), torch.tensor(KEY_WIDTHS).repeat(1, 1, 16), empty(1, 1, 1))
ONLY_PINNED = make_case(torch.zeros(1, 2, 3), torch.full((1, 2, 80), 4), ~empty(1, 2, 3))
ONE_HEAD_RAW = make_case(  # the second head quantises nothing, the third nothing but values
    torch.tensor([[[2, 4, 8, 16], [0, 16, 16, 16], [16, 2, 0, 16]]]),
    torch.tensor([4, 16, 16])[None, :, None].expand(1, 3, 33),
    torch.tensor([[[False] * 4, [False, True, False, False], [False] * 4]]),
)
ONE_HEAD_EMPTY = make_case(torch.tensor([[[0, 0, 0, 0]], [[2, 4, 8, 16]]]), torch.full((2, 1, 96), 2), empty(2, 1, 4))
