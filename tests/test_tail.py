"""The buffers of the tail: what they hold, when they are exchanged, who may write to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rdkv.kernels import naive
from rdkv.kernels.tail import CAPACITY, Tail, TailBuffer, attention


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, 2, 3, count, 8, generator=torch.Generator().manual_seed(seed))
    return keys, values


def buffer(first: int) -> TailBuffer:
    keys, values = tokens(first)
    return TailBuffer(keys.contiguous(), values.contiguous())


@pytest.mark.parametrize("first", [0, 1, 40])
@pytest.mark.parametrize("step", [1, 7, CAPACITY, 2 * CAPACITY + 1])
def test_grows_over_its_capacity(first: int, step: int) -> None:
    grown, expected = buffer(first), tokens(first)
    for seed in range(-(-2 * CAPACITY // step) + 1):
        new = tokens(step, seed)
        grown.append(*new)
        expected = (torch.cat([expected[0], new[0]], 2), torch.cat([expected[1], new[1]], 2))
    assert all(torch.equal(a, b) for a, b in zip(grown.tokens, expected, strict=True))
    assert grown.length == expected[0].shape[2]
    tail = grown.tail
    assert tail.lengths.tolist() == [grown.length] * 2
    grown.append(*tokens(1))
    assert grown.tail.lengths.tolist() == [grown.length] * 2
    rooms = {first + CAPACITY * 2**i for i in range(4)}
    assert grown.tail.keys.shape[2] in rooms
    assert all(t.is_contiguous() for t in (grown.tail.keys, grown.tail.values))


def test_starts_without_room_and_keeps_its_place_while_there_is_some() -> None:
    grown = buffer(40)
    assert sum(t.nbytes for t in grown.tensors()) == 2 * tokens(40)[0].nbytes
    grown.append(*tokens(1))
    before = grown.tail
    grown.append(*tokens(CAPACITY - 1))
    assert grown.tail.keys.data_ptr() == before.keys.data_ptr()
    assert grown.tail.lengths is before.lengths
    grown.append(*tokens(1))
    assert grown.tail.keys.shape[2] == 40 + 2 * CAPACITY


def test_new_tokens_take_the_buffers_type_and_leave_their_graph_behind() -> None:
    grown = TailBuffer(torch.zeros(2, 3, 0, 8).half(), torch.zeros(2, 3, 0, 8).half())
    keys, values = tokens(2)
    grown.append(keys.requires_grad_(), values.requires_grad_())
    assert {t.dtype for t in grown.tokens} == {torch.float16}
    assert not any(t.requires_grad for t in grown.tensors())
    assert torch.equal(grown.tokens[0], keys.half())


def test_inference_mode_and_none_may_take_turns() -> None:
    with torch.inference_mode():
        grown = buffer(3)
        grown.append(*tokens(1))
        assert grown.tail.length == 4
    grown.append(*tokens(1))
    with torch.inference_mode():
        grown.append(*tokens(CAPACITY))
    grown.append(*tokens(1))
    assert grown.tail.lengths.tolist() == [CAPACITY + 6] * 2


@pytest.mark.parametrize("lengths", [[5, 5], [0, 9]])
def test_attention_sees_what_is_held(lengths: list[int]) -> None:
    keys, values = tokens(12)
    query = torch.randn(2, 6, 1, 8)
    tail = Tail(keys, values, torch.tensor(lengths, dtype=torch.int32))
    output, lse = attention(query, tail, 0.3)
    for row, length in enumerate(lengths):
        at = slice(row, row + 1)
        expected = naive.attention(query[at], keys[at, :, :length], values[at, :, :length], 0.3)
        torch.testing.assert_close((output[at], lse[at]), expected)
    if lengths[0] == lengths[1]:
        known = Tail(keys, values, tail.lengths, lengths[0])
        torch.testing.assert_close(attention(query, known, 0.3), (output, lse))


@pytest.mark.parametrize("first", [0, 5])
def test_a_fork_has_what_was_there_from_the_start(first: int) -> None:
    grown, expected = buffer(first), tokens(first)
    grown.append(*tokens(3))
    fork = grown.fork()
    assert all(torch.equal(a, b) for a, b in zip(fork.tokens, expected, strict=True))
    before = [t.clone() for t in grown.tokens]
    fork.append(*tokens(2, seed=1))
    assert (fork.first, fork.length, fork.tail.lengths.tolist()) == (first, first + 2, [first + 2] * 2)
    assert all(torch.equal(a, b) for a, b in zip(grown.tokens, before, strict=True))
    assert not {t.data_ptr() for t in grown.tensors()} & {t.data_ptr() for t in fork.tensors()}
    empty = grown.fork()
    assert first or sum(t.untyped_storage().nbytes() for t in empty.tensors()) == 0
