"""Products of one vector against their twins in plain PyTorch, and those against transformers' modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packs import DEVICE
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from rdkv.kernels import naive_gemv

pytest.importorskip("triton")
from rdkv.kernels import gemv
from rdkv.kernels.gemv import Shape

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, PIECES = Shape(4, 4096, 4, 2), Shape(8, 64, 2, 1)  # tiles of whole rows, and of pieces
CASES = [(96, 64, ROWS, True), (33, 576, ROWS, False), (5, 17, PIECES, False), (70, 130, PIECES, True)]


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(mine: Tensor, theirs: Tensor) -> None:
    """Equal but for the last bits, where sums differ in order; Triton's interpreter cuts bfloat16 off at every turn."""
    last = {torch.float32: 1e-5, torch.bfloat16: 2**-6 if DEVICE == "cuda" else 2**-4, torch.float16: 2**-9}[mine.dtype]
    torch.testing.assert_close(mine, theirs, rtol=last, atol=last * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "shape", "biased"), CASES)
def test_norm_gemv(dtype: torch.dtype, rows: int, columns: int, shape: Shape, biased: bool) -> None:
    norm = LlamaRMSNorm(columns, eps=1e-5).to(DEVICE, dtype)
    norm.weight.data = random(columns, dtype=dtype, seed=0)
    linear = torch.nn.Linear(columns, rows, bias=biased, device=DEVICE, dtype=dtype)
    x = 3 * random(1, columns, dtype=dtype, seed=1)
    arguments: list[Any] = [x, norm.weight.data, 1e-5, linear.weight.data, linear.bias.data if biased else None]
    expected = linear(norm(x)).detach()
    close(naive_gemv.norm_gemv(*arguments), expected)
    close(gemv.norm_gemv(*arguments, shape=shape), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "shape", "biased"), CASES)
def test_gated_gemv(dtype: torch.dtype, rows: int, columns: int, shape: Shape, biased: bool) -> None:
    config = LlamaConfig(hidden_size=columns, intermediate_size=rows, mlp_bias=biased, num_attention_heads=1)
    mlp = LlamaMLP(config).to(DEVICE, dtype)
    x, norm = random(1, columns, dtype=dtype, seed=1), random(columns, dtype=dtype, seed=2)
    pair = (mlp.gate_proj, mlp.up_proj)
    weight = torch.cat([module.weight.data for module in pair])
    bias = torch.cat([module.bias.data for module in pair]) if biased else None
    normed = naive_gemv.add_norm(x, None, norm, 1e-5)
    expected = (mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)).detach()
    close(naive_gemv.gated_gemv(x, norm, 1e-5, weight, bias), expected)
    close(gemv.gated_gemv(x, norm, 1e-5, weight, bias, shape=shape), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "shape", "biased"), CASES)
def test_add_gemv(dtype: torch.dtype, rows: int, columns: int, shape: Shape, biased: bool) -> None:
    linear = torch.nn.Linear(columns, rows, bias=biased, device=DEVICE, dtype=dtype)
    residual, x = random(1, rows, dtype=dtype, seed=1), random(1, columns, dtype=dtype, seed=2)
    expected = (residual + linear(x)).detach()
    arguments = (x, linear.weight.data, linear.bias.data if biased else None)
    for add in (naive_gemv.add_gemv, lambda *given: gemv.add_gemv(*given, shape=shape)):
        changed = residual.clone()
        add(changed, *arguments)
        close(changed, expected)


def test_shape_is_chosen_by_columns() -> None:
    for columns in (64, 5000):
        x, weight = random(1, columns, dtype=torch.float32, seed=0), random(3, columns, dtype=torch.float32, seed=1)
        residual = torch.zeros(1, 3, device=DEVICE)
        gemv.add_gemv(residual, x, weight)
        torch.testing.assert_close(residual, x @ weight.T, rtol=1e-4, atol=1e-4)
