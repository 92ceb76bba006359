"""Tokens in blocks: the kernels against plain PyTorch, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from compiling import run
from hypothesis import given, settings
from hypothesis import strategies as st

from rdkv.kernels import naive_items

pytest.importorskip("triton")
from rdkv.kernels import items

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
quick = settings(max_examples=200 if DEVICE == "cuda" else 25, deadline=None)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where all tokens are pinned
shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 5, 33, 64, 100]))

SCRIPT = """
from compiling import build
from rdkv.kernels import items_kernels as kernels

doubles = dict.fromkeys(("sums", "totals", "weight", "mass", "width"), "*fp64")
TYPES = doubles | {"token": "*fp32", "pinned": "*u8", "weights": "*fp32", "held": "*u8", "counts": "*i64"}
build(kernels.set_apart_kernel, TYPES, 8, BLOCK=2048)
for block in (1, 16):
    for pinned in (False, True):
        build(kernels.block_sums_kernel, TYPES | {"ranked": "*fp32"}, BLOCK=block, BN=2048 // block, PINNED=pinned)
build(kernels.shares_kernel, TYPES, 8, BN=2048, BP=128)
build(kernels.spread_kernel, doubles | {"boundary": "*i64", "order": "*i64", "bits": "*u8"}, S=4, BLOCK=1024)
"""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them for few tokens."""
    monkeypatch.setattr(items, "TOKENS", 32)


@quick
@given(shape=shapes, share=st.sampled_from([0.0, 0.3, 1.0]), most=st.integers(0, 120), seed=st.integers(0, 2**31))
def test_set_apart(shape: tuple[int, int, int], share: float, most: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    token, draw = torch.rand(2, *shape, generator=generator).to(DEVICE)
    pairs = zip(
        items.set_apart(token, draw < share, most), naive_items.set_apart(token, draw < share, most), strict=True
    )
    assert all(actual.equal(meant) and actual.dtype == meant.dtype for actual, meant in pairs)


@quick
@given(
    shape=shapes, block=st.sampled_from([1, 3, 16]), pins=st.integers(0, 20), zero=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_block_weights(shape: tuple[int, int, int], block: int, pins: int, zero: bool, seed: int) -> None:
    token = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(4).exp().to(DEVICE) * (not zero)
    token[..., :pins] = -1.0
    ranked = token.sort(-1).values
    pairs = zip(
        items.block_weights(ranked, block, pins > 0), naive_items.block_weights(ranked, block, pins > 0), strict=True
    )
    for actual, meant in pairs:
        torch.testing.assert_close(actual, meant, rtol=1e-13, atol=0, equal_nan=True)


@quick
@given(shape=shapes, block=st.sampled_from([1, 3, 16]), steps=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_spread(shape: tuple[int, int, int], block: int, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = -(-shape[2] // block)
    boundary = torch.randint(count + 1, (*shape[:2], steps), generator=generator).sort(-1).values.to(DEVICE)
    rows = torch.tensor([0.0, 2, 4, 8, 16], dtype=torch.float64, device=DEVICE).expand(*shape[:2], -1)
    order = torch.rand(shape, generator=generator).argsort(-1).to(DEVICE)
    given_ = (boundary, rows[..., : steps + 1], order, block, count)
    assert items.spread(*given_).equal(naive_items.spread(*given_))


def test_compiles() -> None:
    run(SCRIPT, None)
