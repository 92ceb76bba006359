"""Tokens drawn on the device: the distribution, what is left out, and what a draw depends on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rdkv.kernels.draws import Draws, choose, gumbel

CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5, -30.0])


def draws(rows: int, seeds: Any = None, **settings: Any) -> Draws:
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    return Draws.of(*([value] * rows for value in given.values()), seeds or [0] * rows, CPU)


def frequencies(count: int = 20_000, seed: int = 3, **settings: Any) -> Tensor:
    """Share of each token among draws at many positions."""
    chosen = choose(LOGITS.expand(count, -1), draws(count, [seed] * count, **settings), torch.arange(count))
    return torch.bincount(chosen, minlength=len(LOGITS)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 5, 2**40 + 1, 2**63 - 1])
def test_draws_follow_the_softmax(temperature: float, seed: int) -> None:
    expected = (LOGITS / temperature).softmax(0)
    assert (frequencies(seed=seed, temperature=temperature) - expected).abs().max() < 0.015


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, [0, 4]),
        ({"top_k": 100}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.4}, [0]),  # the first has 0.42
        ({"top_p": 0.6}, [0, 4]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.3}, [0, 2, 4]),  # of the likeliest one's: e^-1 is enough, e^-2 is not
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.8}, [0, 4]),  # of the three, the first two have 0.81
        ({"top_k": 3, "min_p": 0.5}, [0, 4]),
    ],
)
def test_what_is_left_out(settings: dict[str, Any], kept: list[int]) -> None:
    mask = torch.full_like(LOGITS, float("-inf"))
    mask[kept] = 0.0
    expected = (LOGITS + mask).softmax(0)
    assert (frequencies(**settings) - expected).abs().max() < 0.015


def test_greedy_rows_beside_sampled_ones() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    mixed = Draws.of([0.0, 1.0, 0.0, 5.0], [0, 3, 0, 0], [1.0, 1.0, 0.1, 1.0], [0.0] * 4, [1] * 4, CPU)
    chosen = choose(logits, mixed, torch.full((4,), 7))
    assert torch.equal(chosen[[0, 2]], logits.argmax(-1)[[0, 2]])
    alone = choose(logits, draws(4, temperature=0.0), torch.full((4,), 7))
    assert torch.equal(alone, logits.argmax(-1))


@pytest.mark.parametrize("settings", [{}, {"top_k": 20}, {"top_p": 0.9}])
def test_a_draw_is_the_sequences_own(settings: dict[str, Any]) -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    seeds, positions = [4, 9, 2**50], torch.tensor([10, 3, 77])
    together = choose(logits, draws(3, seeds, **settings), positions)
    for row, seed in enumerate(seeds):
        alone = choose(logits[row : row + 1], draws(1, [seed], **settings), positions[row : row + 1])
        assert alone[0] == together[row]


def test_noise_differs_by_seed_position_and_token() -> None:
    tokens = torch.arange(2000).expand(4, -1)
    noise = gumbel(torch.tensor([1, 1, 2, 1 + 2**32]), torch.tensor([5, 6, 5, 5]), tokens)
    assert torch.corrcoef(noise).triu(1).abs().max() < 0.1
    assert noise.isfinite().all()
    # Mean and variance of the standard Gumbel distribution.
    many = gumbel(torch.arange(100), torch.arange(100), torch.arange(2000).expand(100, -1))
    assert float(many.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(many.var()) == pytest.approx(1.6449, abs=0.05)


def test_order_of_equal_logits_does_not_matter() -> None:
    """With top-k off, sorting changes nothing: the noise goes with the token."""
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(8)
    assert torch.equal(choose(logits, draws(8), positions), choose(logits, draws(8, top_k=300), positions))
