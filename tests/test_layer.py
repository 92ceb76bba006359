"""One layer: what it packs, how it decodes, and that the rows of a batch do not touch each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import (
    DIM,
    GROUPS,
    HEADS,
    LAYERS,
    QKV,
    exact_attention,
    forward,
    layer_of,
    new_cache,
    padding,
    prefill,
    random_qkv,
)
from torch import Tensor

import rdkv
from rdkv.kernels.backends import TorchBackend
from rdkv.kernels.packed import Packed
from rdkv.kernels.tail import Tail
from rdkv.runtime.errors import UnsupportedModelError

UNEQUAL = [60, 23, 41, 60]
BUDGETS = [0.08, 0.3, 0.7]


def row_alone(qkv: QKV, row: int, length: int) -> QKV:
    """One sequence of a padded batch, without its padding."""
    query, keys, values = (t[row : row + 1, :, t.shape[2] - length :] for t in qkv)
    return query, keys, values


def held(cache: rdkv.CompressedCache, row: int) -> list[tuple[Tensor, Tensor]]:
    """Restored keys and values of one sequence, head by head, without empty slots."""
    (found,) = [(rows.index(row), segment) for rows, segment in layer_of(cache).segments if row in rows]
    place, segment = found
    keys, values, mask = segment.unpack()
    return [(keys[place, head][mask[place, head]], values[place, head][mask[place, head]]) for head in range(HEADS)]


def fill_padding(qkv: QKV, lengths: list[int], value: float) -> QKV:
    """The same sequences with something else in their padding."""
    mask = padding(lengths)[:, None, :, None]
    query, keys, values = (torch.where(mask, t, value) for t in qkv)
    return query, keys, values


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["head", "layer", "model"])
def test_row_of_a_padded_batch_is_the_row_alone(budget: float, dtype: torch.dtype, scope: str) -> None:
    qkv = random_qkv(len(UNEQUAL), max(UNEQUAL), dtype=dtype)
    options = {"scope": scope}
    batch = new_cache(budget, allocator_options=options)
    outputs = prefill(batch, qkv, padding(UNEQUAL))
    total = 0
    for row, length in enumerate(UNEQUAL):
        alone = new_cache(budget, allocator_options=options)
        output = prefill(alone, row_alone(qkv, row, length))
        assert torch.equal(outputs[0][row, -length:], output[0][0])
        for layer in range(LAYERS):
            mine, theirs = batch.plan(layer), alone.plan(layer)
            assert torch.equal(mine.value_bits[row, :, -length:], theirs.value_bits[0])
            assert torch.equal(mine.pinned[row, :, -length:], theirs.pinned[0])
            assert torch.equal(mine.key_bits[row], theirs.key_bits[0])
            assert not mine.kept[row, :, :-length].any()
        for (keys, values), (keys_alone, values_alone) in zip(held(batch, row), held(alone, 0), strict=True):
            assert torch.equal(keys, keys_alone)
            assert torch.equal(values, values_alone)
        total += alone.nbytes
    # Rows that are packed together share the last byte of a stream, so that they may take less than apart.
    assert 0 <= total - batch.nbytes <= 64 * LAYERS


@pytest.mark.parametrize("budget", BUDGETS)  # at the least one, some row is empty, so that nothing is joined
def test_packed_bytes_of_a_row_are_those_of_the_row_alone(budget: float) -> None:
    lengths = [60, 23, 41]
    qkv = random_qkv(3, 60)
    batch, total = new_cache(budget), 0
    prefill(batch, qkv, padding(lengths))
    for row, length in enumerate(lengths):
        alone = new_cache(budget)
        prefill(alone, row_alone(qkv, row, length))
        ((_, segment),) = [part for part in layer_of(batch).segments if part[0] == [row]]
        ((_, expected),) = layer_of(alone).segments
        pairs = list(zip(segment.unpack(), expected.unpack(), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs)
        total += alone.nbytes
    assert batch.nbytes == total


@pytest.mark.parametrize("value", [1e4, float("nan")])
def test_what_is_in_the_padding_does_not_matter(value: float) -> None:
    qkv = random_qkv(4, 60)
    mask = padding(UNEQUAL)
    plain, noisy = new_cache(), new_cache()
    outputs = [
        prefill(cache, data, mask)[0] for cache, data in ((plain, qkv), (noisy, fill_padding(qkv, UNEQUAL, value)))
    ]
    assert all(torch.equal(a, b) for a, b in zip(plain.tensors(), noisy.tensors(), strict=True))
    real = mask[:, :, None, None]
    assert torch.equal(outputs[0] * real, outputs[1].masked_fill(~real, 0.0))
    new = random_qkv(4, 1, seed=1)
    longer = torch.nn.functional.pad(mask, (0, 1), value=True)
    assert torch.equal(forward(plain, 0, new, longer), forward(noisy, 0, new, longer))


def test_other_rows_do_not_matter() -> None:
    qkv, other = random_qkv(4, 60), random_qkv(4, 60, seed=1)
    swapped = tuple(torch.cat([a[:1], b[1:]]) for a, b in zip(qkv, other, strict=True))
    # Settings under which so few tokens do not get the same bits whatever they are.
    plain: dict[str, Any] = {"scorer_options": {"kernel": "mean", "smoothing": 65, "ahead": 0.5}}
    plain["allocator_options"] = {"key_weight": 1.0}
    first, second = new_cache(**plain), new_cache(**plain)
    prefill(first, qkv, padding(UNEQUAL))
    prefill(second, (swapped[0], swapped[1], swapped[2]), padding(UNEQUAL))
    assert torch.equal(first.plan(0).value_bits[0], second.plan(0).value_bits[0])
    assert not torch.equal(first.plan(0).value_bits[1], second.plan(0).value_bits[1])
    for (keys, values), (keys_again, values_again) in zip(held(first, 0), held(second, 0), strict=True):
        assert torch.equal(keys, keys_again)
        assert torch.equal(values, values_again)


def test_prompt_attends_to_itself_uncompressed() -> None:
    qkv = random_qkv(4, 60)
    query, keys, values = qkv
    mask = padding(UNEQUAL)
    outputs = prefill(new_cache(0.1), qkv, mask)
    visible = torch.ones(60, 60).tril().bool() & mask[:, None, None, :] | torch.eye(60).bool()
    expected = exact_attention(query, keys, values, visible.expand(4, HEADS, 60, 60))
    for output in outputs:
        torch.testing.assert_close(output.double()[mask], expected[mask], rtol=1e-4, atol=1e-5)


def whole_attention(cache: rdkv.CompressedCache, query: Tensor, tail_mask: Tensor | None = None) -> Tensor:
    """Attention over the concatenation of what each row's segment holds and the tail, row by row in float64."""
    layer = layer_of(cache)
    assert layer.keys is not None
    assert layer.values is not None
    new, total = query.shape[2], layer.keys.shape[2]
    seen = torch.ones(new, total, dtype=torch.bool).tril(total - new).expand(query.shape[0], HEADS, new, total)
    if tail_mask is not None:
        itself = torch.eye(total, dtype=torch.bool)[total - new :]
        seen = seen & tail_mask[:, None, None, :] | itself
    outputs: list[Tensor] = [torch.empty(0)] * query.shape[0]
    for rows, segment in layer.segments:
        keys, values, mask = segment.unpack()
        for place, row in enumerate(rows):
            at, tail = slice(place, place + 1), slice(row, row + 1)
            outputs[row] = exact_attention(
                query[tail],
                torch.cat([keys[at], layer.keys[tail].float()], 2),
                torch.cat([values[at], layer.values[tail].float()], 2),
                torch.cat([mask[at, :, None].expand(-1, -1, new, -1), seen[tail]], 3),
            )
    return torch.cat(outputs)


@pytest.mark.parametrize("budget", [*BUDGETS, 0.001])
@pytest.mark.parametrize("lengths", [[60], [60, 60, 60], UNEQUAL])
@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attends_to_what_is_held_and_the_tail(
    budget: float, lengths: list[int], new: int, dtype: torch.dtype
) -> None:
    batch, mask = len(lengths), padding(lengths)
    cache = new_cache(budget)
    prefill(cache, random_qkv(batch, max(lengths), dtype=dtype), mask)
    assert layer_of(cache).segments
    for step in range(3):
        qkv = random_qkv(batch, new, seed=1 + step, dtype=dtype)
        mask = torch.nn.functional.pad(mask, (0, new), value=True)
        output = forward(cache, 0, qkv, None if bool(mask.all()) else mask)
        assert output.dtype == dtype
        rtol, atol = (1e-2, 1e-2) if dtype == torch.bfloat16 else (1e-4, 1e-5)
        torch.testing.assert_close(output.double(), whole_attention(cache, qkv[0]), rtol=rtol, atol=atol)
    assert layer_of(cache).get_seq_length() == max(lengths) + 3 * new


def test_padding_inside_the_tail() -> None:
    # A further turn of unequal length is padded on its left, which is inside the sequence.
    cache = new_cache()
    prefill(cache, random_qkv(3, 60), padding([60, 23, 60]))
    turn = padding([2, 6, 4])
    qkv = random_qkv(3, 6, seed=1)
    output = forward(cache, 0, qkv, torch.cat([padding([60, 23, 60]), turn], 1))
    torch.testing.assert_close(output.double(), whole_attention(cache, qkv[0], turn), rtol=1e-4, atol=1e-5)
    noisy = new_cache()
    prefill(noisy, random_qkv(3, 60), padding([60, 23, 60]))
    again = forward(noisy, 0, fill_padding(qkv, [2, 6, 4], 50.0), torch.cat([padding([60, 23, 60]), turn], 1))
    torch.testing.assert_close(output[turn], again[turn])


def test_new_tokens_see_what_came_before_only() -> None:
    one, many = new_cache(), new_cache()
    for cache in (one, many):
        prefill(cache, random_qkv(1, 60))
    query, keys, values = random_qkv(1, 4, seed=1)
    together = forward(many, 0, (query, keys, values))
    for i in range(4):
        part = slice(i, i + 1)
        output = forward(one, 0, (query[:, :, part], keys[:, :, part], values[:, :, part]))
        torch.testing.assert_close(output, together[:, part])


def test_whole_budget_keeps_the_tensors_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cache = new_cache(1.0)
        _, keys, values = qkv = random_qkv(2, 60, dtype=dtype)
        prefill(cache, qkv)
        layer = layer_of(cache)
        assert layer.keys is not None
        assert layer.values is not None
        assert not layer.segments
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
        assert layer.keys.dtype == dtype
        assert layer.keys.data_ptr() != keys.data_ptr()


def test_padded_batch_at_whole_budget() -> None:
    qkv = random_qkv(4, 60, dtype=torch.bfloat16)
    cache = new_cache(1.0)
    prefill(cache, qkv, padding(UNEQUAL))
    assert cache.retention == 1.0
    for row, length in enumerate(UNEQUAL):
        _, keys, values = row_alone(qkv, row, length)
        for head, (held_keys, held_values) in enumerate(held(cache, row)):
            assert torch.equal(held_keys, keys[0, head].float())
            assert torch.equal(held_values, values[0, head].float())
    new = random_qkv(4, 1, seed=1, dtype=torch.bfloat16)
    mask = torch.nn.functional.pad(padding(UNEQUAL), (0, 1), value=True)
    output = forward(cache, 0, new, mask)
    keys, values = (torch.cat(pair, 2) for pair in zip(qkv[1:], new[1:], strict=True))
    expected = exact_attention(new[0], keys, values, mask[:, None, None, :].expand(4, HEADS, 1, 61))
    torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("factor", "dtype"), [(1.0, torch.float16), (1e5, torch.bfloat16)])
def test_float32_is_stored_in_16_bits(factor: float, dtype: torch.dtype) -> None:
    query, keys, values = random_qkv(1, 60)
    keys[:, :, :2] *= factor  # as the first tokens of a real model, which stay outside the quantiser
    cache = new_cache(0.3)
    prefill(cache, (query, keys, values))
    layer = layer_of(cache)
    assert layer.keys is not None
    assert layer.keys.dtype == dtype
    ((_, segment),) = layer.segments
    assert {tensor.dtype for tensor in segment.tensors() if tensor.is_floating_point()} == {torch.float16, dtype}
    restored, _, mask = segment.unpack()
    assert torch.equal(restored[:, :, 0].to(dtype), keys[:, :, 0].to(dtype))
    assert restored[mask].isfinite().all()


@pytest.mark.parametrize("row", [0, 1])
def test_tail_reaches_as_far_as_any_row(row: int) -> None:
    lengths = [60, 30]
    query, keys, values = random_qkv(2, 60)
    start = 60 - lengths[row]
    values[row, :, start : start + 2] *= 1e5
    cache = new_cache(0.3)
    prefill(cache, (query, keys, values), padding(lengths))
    layer = layer_of(cache)
    assert layer.keys is not None
    assert layer.keys.dtype == torch.bfloat16
    query, keys, values = random_qkv(2, 1, seed=1)
    values[row] *= 1e5
    mask = torch.nn.functional.pad(padding(lengths), (0, 1), value=True)
    assert forward(cache, 0, (query, keys, values), mask).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models_keep_their_type(dtype: torch.dtype) -> None:
    cache = new_cache(0.3)
    prefill(cache, random_qkv(1, 60, dtype=dtype))
    layer = layer_of(cache)
    assert layer.keys is not None
    assert layer.keys.dtype == dtype


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (padding([60, 30]).flip(1), "padded on the right or inside; pad on the left"),
        (torch.ones(2, 60).bool() & (torch.arange(60) != 30), "padded on the right or inside"),
        (padding([60, 0]), "sequence 1 of the batch has no tokens"),
    ],
)
def test_padding_that_is_refused(mask: Tensor, words: str) -> None:
    cache = new_cache()
    with pytest.raises(UnsupportedModelError, match=words):
        prefill(cache, random_qkv(2, 60), mask)
    assert cache.nbytes == 0


def test_mask_of_an_unpadded_prompt_is_no_padding() -> None:
    masked, plain = new_cache(), new_cache()
    prefill(masked, random_qkv(2, 60), torch.ones(2, 60, dtype=torch.bool))
    prefill(plain, random_qkv(2, 60))
    assert all(torch.equal(a, b) for a, b in zip(masked.tensors(), plain.tensors(), strict=True))


def test_prompt_of_one_token() -> None:
    for budget in (0.1, 0.5, 1.0):
        cache = new_cache(budget)
        _, _, values = qkv = random_qkv(2, 1)
        output = prefill(cache, qkv)[0]
        torch.testing.assert_close(output[:, 0], values[:, :, 0].repeat_interleave(GROUPS, 1))
        assert cache.retention <= budget
        assert forward(cache, 0, random_qkv(2, 1, seed=1)).shape == (2, 1, HEADS * GROUPS, DIM)
        assert cache.get_seq_length() == 2


def test_nothing_kept_leaves_the_tail_alone() -> None:
    cache = new_cache(0.001)
    prefill(cache, random_qkv(1, 60))
    assert cache.prompt_nbytes == 0
    assert not cache.plan(0).kept.any()
    _, _, values = qkv = random_qkv(1, 1, seed=1)
    stored = values.half().float()
    torch.testing.assert_close(forward(cache, 0, qkv)[:, 0], stored[:, :, 0].repeat_interleave(GROUPS, 1))


@pytest.mark.parametrize("lengths", [[60, 60], UNEQUAL])
def test_batch_is_decoded_at_once(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, mask = new_cache(0.7), padding(lengths)
    prefill(cache, random_qkv(len(lengths), 60), mask)
    calls: list[tuple[int, int | None]] = []

    def attend(query: Tensor, packed: Packed, scale: float, tail: Tail | None = None) -> tuple[Tensor, Tensor]:
        calls.append((packed.batch, None if tail is None else tail.length))
        return TorchBackend().attend(query, packed, scale, tail)

    monkeypatch.setattr(cache.backend, "attend", attend)
    for new in (1, 1, 3):
        mask = torch.nn.functional.pad(mask, (0, new), value=True)
        forward(cache, 0, random_qkv(len(lengths), new, seed=1), mask)
    assert calls == [(len(lengths), 1), (len(lengths), 2), (len(lengths), None)]


def test_layers_of_a_pass_share_what_was_read_of_their_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = new_cache()
    prefill(cache, random_qkv(4, 60), padding(UNEQUAL))
    qkv, mask = random_qkv(4, 1, seed=1), torch.nn.functional.pad(padding(UNEQUAL), (0, 1), value=True)
    forward(cache, 0, qkv, mask)
    monkeypatch.setattr(Tensor, "all", lambda _: pytest.fail("the device was asked again"))
    forward(cache, 1, qkv, mask)
    forward(cache, 1, qkv, None)


@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize("lengths", [[60, 60], UNEQUAL])
def test_tail_outgrows_its_buffers(budget: float, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rdkv.kernels.tail.CAPACITY", 4)
    cache, mask = new_cache(budget), padding(lengths)
    prefill(cache, random_qkv(len(lengths), 60), mask)
    packed, rooms = cache.prompt_nbytes, set()
    for step in range(20):
        qkv = random_qkv(len(lengths), 1, seed=1 + step)
        mask = torch.nn.functional.pad(mask, (0, 1), value=True)
        output = forward(cache, 0, qkv, None if bool(mask.all()) else mask)
        layer = layer_of(cache)
        assert layer.tail is not None
        if layer.segments:
            torch.testing.assert_close(output.double(), whole_attention(cache, qkv[0]), rtol=1e-4, atol=1e-5)
        rooms.add(layer.tail.tail.keys.shape[2] - layer.tail.first)
        assert cache.prompt_nbytes == packed
    assert rooms == {4, 8, 16, 32}
    assert cache.get_seq_length() == 80


def test_attention_that_never_comes_is_noticed() -> None:
    cache = new_cache()
    _, keys, values = random_qkv(1, 60)
    cache.update(keys, values, 0)
    with pytest.raises(UnsupportedModelError, match=r"layer 0: .*rdkv\.attach"):
        cache.update(keys, values, 0)


def test_graph_of_the_caller_is_not_kept() -> None:
    # Without torch.no_grad() around the prompt, whatever is cut from its keys would keep all of them alive.
    for budget in (0.3, 1.0):
        cache = new_cache(budget)
        query, keys, values = random_qkv(1, 60, dtype=torch.bfloat16)
        prefill(cache, (query.requires_grad_(), keys.requires_grad_(), values.requires_grad_()))
        assert not any(tensor.requires_grad for tensor in cache.tensors())
