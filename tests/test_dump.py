"""Segments as tensors and back; tensors that lie are refused."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import msgspec
import pytest
import torch
from packs import KEY_WIDTHS, VALUE_WIDTHS
from torch import Tensor

from rdkv.plugins.rdkv.dump import LAYOUT
from rdkv.plugins.rdkv.format import MixedBit, MixedBitOptions
from rdkv.plugins.rdkv.segment import MixedBitSegment
from rdkv.plugins.rdkv.whole import EmptySegment, WholeSegment
from rdkv.runtime.errors import ConfigError
from rdkv.runtime.interfaces import PackedSegment
from rdkv.runtime.plan import BitPlan

BATCH, HEADS, TOKENS, DIM = 2, 2, 50, 16
SHAPE = (BATCH, HEADS, TOKENS, DIM)
CPU = torch.device("cpu")
FORMAT = MixedBit()

Dumped = tuple[dict[str, Tensor], dict[str, Any]]


def make(
    batch: int = BATCH,
    tokens: int = TOKENS,
    cache_format: MixedBit = FORMAT,
    seed: int = 0,
    key_widths: Tensor = KEY_WIDTHS,
) -> PackedSegment:
    """A segment of every width, with pinned tokens; one head quantises nothing."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randint(-50, 50, (2, batch, HEADS, tokens, DIM), generator=generator).bfloat16()
    value_bits = VALUE_WIDTHS[torch.randint(5, (batch, HEADS, tokens), generator=generator)]
    key_bits = key_widths[torch.randint(len(key_widths), (batch, HEADS, DIM), generator=generator)]
    value_bits[-1, -1], key_bits[-1, -1] = 16 * (value_bits[-1, -1] > 2), 16
    pinned = (torch.arange(tokens) < 3).repeat(batch, HEADS, 1)
    return cache_format.pack(keys, values, BitPlan(value_bits, key_bits, pinned))


def reload(dumped: Dumped, shape: tuple[int, int, int, int] = SHAPE) -> PackedSegment:
    """What is made of a dump, its header once through JSON."""
    tensors, header = dumped
    return FORMAT.load(tensors, msgspec.json.decode(msgspec.json.encode(header)), shape, CPU)


def same(a: PackedSegment, b: PackedSegment) -> bool:
    """Whether two segments hold the same to the bit."""
    pairs = list(zip(a.tensors(), b.tensors(), strict=True))
    return type(a) is type(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def test_packed_segment() -> None:
    segment = make()
    loaded = reload(FORMAT.dump(segment))
    assert isinstance(loaded, MixedBitSegment)
    assert isinstance(segment, MixedBitSegment)
    assert same(segment, loaded)
    assert (loaded.packed.host_counts, loaded.packed.raw) == (segment.packed.host_counts, segment.packed.raw)
    assert max(loaded.packed.raw) > 0
    assert all(map(torch.equal, vars(loaded.plan()).values(), vars(segment.plan()).values()))


def test_without_positions() -> None:
    segment = make(cache_format=MixedBit(MixedBitOptions(positions=False)))
    loaded = reload(FORMAT.dump(segment))
    assert same(segment, loaded)
    with pytest.raises(ConfigError, match="the plan was not kept"):
        loaded.plan()


@pytest.mark.parametrize("bits", [0, 16])
def test_extreme_plans(bits: int) -> None:
    keys, values = torch.randn(2, *SHAPE).half()
    segment = FORMAT.pack(keys, values, BitPlan.uniform(SHAPE, bits, CPU))
    assert isinstance(segment, WholeSegment if bits else EmptySegment)
    loaded = reload(FORMAT.dump(segment))
    assert same(segment, loaded)
    assert loaded.plan().value_bits.shape == SHAPE[:3]


def test_segments_that_share_a_batch_are_taken_apart_and_joined_again() -> None:
    rows = [[0, 3], [2, 1]]
    before = FORMAT.join([make(tokens=50), make(tokens=31, seed=1)], rows)
    assert before is not None
    shapes = [(2, HEADS, tokens, DIM) for tokens in (50, 31)]
    dumped = [FORMAT.dump(segment) for segment in before[0]]
    after = FORMAT.join([reload(*each) for each in zip(dumped, shapes, strict=True)], rows)
    assert after is not None
    assert same(before[1], after[1])
    assert all(map(same, before[0], after[0]))


def test_layout_is_what_its_number_says() -> None:
    """Who makes this fail has changed what a `Packed` holds: raise LAYOUT, and put the new digest here."""
    tensors, _ = FORMAT.dump(make(key_widths=VALUE_WIDTHS))
    digest = sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)} ".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    assert (LAYOUT, digest.hexdigest()[:16]) == (2, "b4c9293a004a6729")


def test_another_layout() -> None:
    tensors, header = FORMAT.dump(make())
    with pytest.raises(ConfigError, match="packed in layout 3, this rdkv reads 2"):
        reload((tensors, header | {"layout": LAYOUT + 1}))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("counts", lambda t: t[:-1], "counts are"),
        ("counts", lambda t: t.long(), "counts are"),
        ("counts", lambda t: t[:, :-1].contiguous(), "counts are"),
        ("counts", lambda t: torch.where(torch.arange(4)[:, None] == 1, 1 << 30, t).int(), "row 1"),
        ("counts", lambda t: torch.where(torch.arange(t.shape[1]) == 0, t + 16, t), "row|key_codes is"),
        ("key_codes", lambda t: t[1:], "key_codes is"),
        ("value_codes", lambda t: torch.cat([t, t]), "value_codes is"),
        ("key_columns", lambda t: t.fill_(DIM), "key_columns name a channel beyond 16"),
        ("pinned_keys", lambda t: t.float(), "pinned_values is"),
        ("pinned_values", lambda t: t[:, 1:].contiguous(), "pinned_values is"),
        ("kept", lambda t: t[:, 1:], "kept is"),
        ("kept", lambda t: t.bitwise_not_(), "positions are not those"),
        ("classes", lambda t: t[1:], "classes is"),
        ("pinned", lambda t: t.long(), "pinned is"),
        ("pinned", lambda t: t.fill_(TOKENS), "not one of 50"),
        ("pinned", lambda t: t.fill_(-1), "not one of 50"),
    ],
)
def test_tensors_that_lie(name: str, change: Callable[[Tensor], Tensor], words: str) -> None:
    tensors, header = FORMAT.dump(make())
    tensors[name] = change(tensors[name].clone())
    with pytest.raises(ValueError, match=words):
        reload((tensors, header))


def test_shape_of_the_prompt_bounds_what_is_held() -> None:
    dumped = FORMAT.dump(make(cache_format=MixedBit(MixedBitOptions(positions=False))))
    with pytest.raises(ValueError, match=r"a head holds \d+ tokens of a prompt of 9"):
        reload(dumped, (BATCH, HEADS, 9, DIM))
    for shape in ((3, HEADS, TOKENS, DIM), (BATCH, 1, TOKENS, DIM), (BATCH, HEADS, TOKENS, 2 * DIM)):
        with pytest.raises(ValueError, match=r"counts are|is \["):
            reload(dumped, shape)


def test_whole_prompts_have_their_shape() -> None:
    keys, values = torch.randn(2, *SHAPE).half()
    tensors, header = FORMAT.dump(WholeSegment(keys, values))
    for other in (keys[:, :1], keys.float(), keys.long()):
        with pytest.raises(ValueError, match=r"(keys|values) are .* not \[2, 2, 50, 16\] floats of one type"):
            reload((tensors | {"keys": other}, header))


def test_names_and_headers() -> None:
    tensors, header = FORMAT.dump(make())
    wrong: list[Dumped] = [
        ({}, header),
        (tensors, header | {"kind": "empty"}),
        (tensors | {"more": tensors["kept"]}, header),
        ({name: tensor for name, tensor in tensors.items() if name != "classes"}, header),
    ]
    for dumped in wrong:
        with pytest.raises(ValueError, match="a segment of kind"):
            reload(dumped)
    for change in ({"kind": "other"}, {"raw": ["a"]}, {"more": 1}, {"layout": "1"}):
        with pytest.raises(msgspec.ValidationError):
            reload((tensors, header | change))
    for raw in ([], [0, 0, 0, -1], [0, 0, 0, 1 << 40]):
        with pytest.raises(ValueError, match="raw"):
            reload((tensors, header | {"raw": raw}))


def test_a_rotation_that_cannot_be() -> None:
    tensors, header = FORMAT.dump(make())
    with pytest.raises(ValueError, match=f"values of {DIM} channels are said to be rotated over 8"):
        reload((tensors, header | {"span": 8}))


def test_without_a_rotation() -> None:
    plain = MixedBit(MixedBitOptions(rotate=False))
    segment = make(cache_format=plain)
    loaded = reload(plain.dump(segment))
    assert same(segment, loaded)
    assert torch.equal(segment.unpack()[1], loaded.unpack()[1])
    assert not torch.equal(segment.unpack()[1], make().unpack()[1])
