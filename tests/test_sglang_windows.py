"""The last queries of prompts that are read in chunks, several at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rdkv.plugins.sglang.windows import Chunk, QueryWindows

WIDTH = 8


def read(windows: QueryWindows, queries: Tensor, owner: str, cuts: list[int]) -> None:
    """Let ``windows`` see a prompt's ``queries`` ``[T, H, D]`` in the chunks between ``cuts``."""
    total = len(queries)
    for start, end in zip([0, *cuts], [*cuts, total], strict=True):
        windows.chunks = [Chunk(owner, start, end, total)]
        windows.keep(0, queries[start:end], 0.5)


@pytest.mark.parametrize("cuts", [[], [10], [19], [15, 18], [1, 2, 3], [13, 14, 15, 16, 17, 18, 19]])
def test_the_window_crosses_chunks(cuts: list[int]) -> None:
    windows, queries = QueryWindows(WIDTH), torch.randn(20, 3, 4)
    read(windows, queries, "a", cuts)
    assert torch.equal(windows.take("a", 0), queries[-WIDTH:].transpose(0, 1).unsqueeze(0))
    assert windows.scales == {0: 0.5}
    windows.drop("a")
    assert len(windows) == 0


def test_prompts_shorter_than_the_window() -> None:
    windows, queries = QueryWindows(WIDTH), torch.randn(5, 3, 4)
    read(windows, queries, "a", [2])
    assert windows.take("a", 0).shape == (1, 3, 5, 4)


def test_several_prompts_in_a_pass_and_padding_behind_them() -> None:
    windows, queries = QueryWindows(WIDTH), torch.randn(40, 3, 4)
    windows.chunks = [Chunk("a", 12, 20, 20), Chunk("b", 0, 6, 30), Chunk("c", 4, 16, 16)]
    windows.keep(1, queries, 1.0)
    assert torch.equal(windows.take("a", 1), queries[:8].transpose(0, 1).unsqueeze(0))
    assert torch.equal(windows.take("c", 1), queries[18:26].transpose(0, 1).unsqueeze(0))
    assert len(windows) == 2  # nothing of b is among its last


def test_what_is_kept_is_a_copy() -> None:
    windows, queries = QueryWindows(WIDTH), torch.ones(4, 3, 4)
    read(windows, queries, "a", [])
    queries.zero_()
    assert bool((windows.take("a", 0) == 1).all())
