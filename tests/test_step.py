"""The small kernels of a decode step against their twins in plain PyTorch, and those against transformers' modules."""

from __future__ import annotations

import pytest
import torch
from packs import DEVICE
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial

from rdkv.kernels import naive_step
from rdkv.kernels.naive_step import HeadNorms

pytest.importorskip("triton")
from rdkv.kernels import step

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poison")


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(mine: Tensor, theirs: Tensor, computed: torch.dtype | None = None) -> None:
    """Equal but for the last bit, where sums differ in order; Triton's interpreter cuts bfloat16 off at every turn."""
    last = {torch.float32: 1e-6, torch.bfloat16: 2**-7 if DEVICE == "cuda" else 2**-5, torch.float16: 2**-10}
    tolerance = max(last[mine.dtype], last[computed or mine.dtype])
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4096), (3, 576), (2, 17)])
@pytest.mark.parametrize("adds", [True, False])
def test_add_norm(dtype: torch.dtype, shape: tuple[int, int], adds: bool) -> None:
    residual, delta = (3 * random(*shape, dtype=dtype, seed=seed) for seed in (0, 1))
    norm = LlamaRMSNorm(shape[1], eps=1e-5).to(DEVICE, dtype)
    norm.weight.data = random(shape[1], dtype=dtype, seed=2)
    whole = residual + delta if adds else residual.clone()
    expected = norm(whole)
    for module in (naive_step, step):
        changed = residual.clone()
        out = module.add_norm(changed, delta if adds else None, norm.weight.data, 1e-5)
        close(changed, whole)
        close(out, expected.detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (16, 8), (96, 96), (24, 0)])
def test_append(dtype: torch.dtype, stored: torch.dtype, norms: bool, dim: int, rotary: int) -> None:
    batch, q_heads, heads, capacity = 2, 4, 2, 9
    qkv = random(batch, (q_heads + 2 * heads) * dim, dtype=dtype)
    angles = random(batch, rotary // 2, dtype=torch.float32, seed=1).repeat(1, 2)
    cos, sin = (angles.cos().to(dtype), angles.sin().to(dtype)) if rotary else (None, None)
    weights = HeadNorms(random(dim, dtype=dtype, seed=2), random(dim, dtype=dtype, seed=3), 1e-6) if norms else None
    lengths = torch.tensor([9, 3], dtype=torch.int32, device=DEVICE)
    tails = [torch.full((batch, heads, capacity, 2 * dim), 7.0, dtype=stored, device=DEVICE) for _ in range(4)]
    tails = [tail[..., :dim] for tail in tails]  # slots that do not lie side by side

    query, key, value = qkv.view(batch, -1, dim).split([q_heads, heads, heads], 1)
    if weights is not None:
        norm = LlamaRMSNorm(dim, eps=1e-6).to(DEVICE, dtype)
        norm.weight.data = weights.query
        query = norm(query).detach()
        norm.weight.data = weights.key
        key = norm(key).detach()
    if cos is not None and sin is not None:
        rotate = apply_rotary_pos_emb if rotary == dim else apply_partial
        query, key = rotate(query, key, cos, sin, unsqueeze_dim=1)
    for module, keys, values in ((naive_step, *tails[:2]), (step, *tails[2:])):
        out = module.append(qkv, cos, sin, weights, lengths, keys, values)
        close(out, query.unsqueeze(2))
        for tail, expected in ((keys, key), (values, value)):
            for row, last in enumerate((8, 2)):
                close(tail[row, :, last], expected[row].to(stored), computed=dtype)
                others = [slot for slot in range(capacity) if slot != last]
                assert (tail[row, :, others] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1024), (3, 1500), (2, 7)])
def test_gated(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate, up = (3 * random(*shape, dtype=dtype, seed=seed) for seed in (0, 1))
    expected = torch.nn.functional.silu(gate) * up
    for module in (naive_step, step):
        close(module.gated(torch.cat([gate, up], 1)), expected)
