"""How unlike the others each value is: the kernels against plain PyTorch, and that against what it should be."""

from __future__ import annotations

import pytest
import torch
from packs import DEVICE
from torch import Tensor

from rdkv.kernels import naive_leverage

SIZES = [(1, 2, 300, 64), (2, 1, 40, 80), (1, 3, 9000, 16), (1, 1, 200, 160)]


def made(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values with a mean, whose channels depend on each other and differ in size."""
    mix = torch.randn(dim, dim) / dim**0.5 + torch.diag(torch.linspace(0.1, 3, dim))
    values = torch.randn(batch, heads, tokens, dim) @ mix + torch.randn(heads, 1, dim)
    return values.to(DEVICE, dtype)


@pytest.mark.parametrize("dim", [24, 64, 80])
def test_is_the_leverage_of_a_regression(dim: int) -> None:
    """In each block of channels the diagonal of the projection onto the span of the centred values, by QR."""
    values = (torch.randn(300, dim) * torch.linspace(0.5, 3, dim) + 1).to(DEVICE)
    expected = torch.zeros(300, dtype=torch.float64, device=DEVICE)
    for block in values.double().split(32, 1):
        q, _ = torch.linalg.qr(block - block.mean(0))
        expected += q.square().sum(1) * 300 / dim
    found = naive_leverage.leverage(values[None, None])[0, 0].double()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_one_in_the_mean() -> None:
    found = naive_leverage.leverage(made(1, 3, 9000, 16))
    torch.testing.assert_close(found.mean(-1), torch.ones(1, 3, device=DEVICE), rtol=0.02, atol=0)


def test_scale_and_rotation_do_not_matter() -> None:
    """A rotation of each block, which is all that is regarded together."""
    values = made(1, 2, 300, 64)
    turn = torch.block_diag(*(torch.linalg.qr(torch.randn(32, 32))[0] for _ in range(2)))
    turned = 7 * values @ turn.to(DEVICE) + 2
    torch.testing.assert_close(naive_leverage.leverage(turned), naive_leverage.leverage(values), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_do_the_same(size: tuple[int, ...], dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from rdkv.kernels import leverage

    values = made(*size, dtype)
    torch.testing.assert_close(leverage.leverage(values), naive_leverage.leverage(values), rtol=0.02, atol=0.01)
    strided = values.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(leverage.leverage(strided), leverage.leverage(values), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("odd", ["alike", "inf", "nan", "huge", "one"])
def test_what_has_no_leverage(odd: str) -> None:
    """Values that are all alike, or not finite: each counts as any other, in the heads that have them."""
    pytest.importorskip("triton")
    from rdkv.kernels import leverage

    values = made(1, 2, 50, 16)
    if odd == "one":
        values = values[:, :, :1]
    elif odd == "alike":
        values[:, 1] = 3.0
    else:
        values[0, 1, 7, 3] = {"inf": float("inf"), "nan": float("nan"), "huge": 3e30}[odd]
    for module in (naive_leverage, leverage):
        found = module.leverage(values)
        assert bool(found.isfinite().all())
        assert bool((found[:, 1] == 1).all()) or odd == "huge"
        if odd != "one":
            torch.testing.assert_close(found[:, 0], naive_leverage.leverage(values[:, :1])[:, 0], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("alike", [3.0, 0.7, 0.0, 1e3])  # 0.7 is no float: neither are sums of it what they should be
def test_a_block_that_is_all_alike_counts_as_one(alike: float) -> None:
    pytest.importorskip("triton")
    from rdkv.kernels import leverage

    values = made(1, 2, 60, 80)
    values[:, 1, :, 32:64] = alike
    first, last = (naive_leverage.leverage(part.contiguous()) for part in (values[..., :32], values[..., 64:]))
    expected = (32 * first + 32 + 16 * last) / 80
    for module in (naive_leverage, leverage):
        torch.testing.assert_close(module.leverage(values)[:, 1], expected[:, 1], rtol=0.02, atol=0.01)
