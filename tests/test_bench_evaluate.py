"""Scores of caches: teacher-forced as one token at a time, generated as the model does, bytes that are held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedTokenizerFast

import rdkv
from bench.quality.evaluate import FULL, Batch, Cell, Kinds
from bench.quality.method import Compressed, Full, Ours, Prompt, full_nbytes
from bench.quality.sample import PROTOCOLS, Protocol, Sample
from bench.quality.scoring import answer_logits, compare, generate

DRAW = torch.Generator().manual_seed(0)


def tokens(count: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 259, (count,), generator=DRAW).tolist())


ROWS = [tokens(40), tokens(40), tokens(40)]
ASKED = [tokens(4), (), tokens(9)]
ANSWERS = [tokens(6), tokens(1), tokens(3)]


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    return rdkv.attach(tiny_model())


def sample(index: int, **changes: Any) -> Sample:
    made = Sample("task", index, 0, ROWS[index], tokens(5), tokens(7), 6, judge=lambda text: float(bool(text)))
    return replace(made, **changes)


@torch.no_grad()
def one_at_a_time(model: Any, cache: Any, row: Sequence[int], after: Sequence[int]) -> list[torch.Tensor]:
    """Logits after the prompt and after every token that follows it."""
    logits = [model(torch.tensor([list(row)]), past_key_values=cache).logits[0, -1]]
    return logits + [model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1] for token in after]


@pytest.mark.parametrize("budget", [None, 0.4])
def test_teacher_forced_as_one_token_at_a_time(model: Any, budget: float | None) -> None:
    """Rows of a batch with questions and answers of any lengths, also on a cache that is not the full one."""
    prompt = Prompt.read(model, ROWS)
    method = Full() if budget is None else Ours("ours")
    with method.compress(prompt, budget or 1.0) as held:
        found = answer_logits(prompt, held.fork(), ASKED, ANSWERS)
        again = answer_logits(prompt, held.fork(), ASKED, ANSWERS)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))  # a fork leaves the cache as it is
    for logits, row, question, answer in zip(found, ROWS, ASKED, ANSWERS, strict=True):
        config = rdkv.CompressionConfig(budget=budget or 1.0)
        own = DynamicCache(config=model.config) if budget is None else rdkv.CompressedCache(model.config, config)
        expected = one_at_a_time(model, own, row, [*question, *answer[:-1]])[len(question) :]
        assert logits.shape[0] == len(answer)
        torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-3, atol=1e-3)


def test_compare() -> None:
    full = torch.tensor([[0.0, 3.0, 0.0], [2.0, 0.0, 0.0]])
    other = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 4.0]])
    same, found = compare(full, full, [1, 2]), compare(other, full, [1, 2])
    assert (same.accuracy, same.agreement, same.kl) == (0.5, 1.0, 0.0)
    assert (found.accuracy, found.agreement) == (1.0, 0.5)
    p, q = full.softmax(-1), other.softmax(-1)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert found.nll == pytest.approx(float(-(q[0, 1].log() + q[1, 2].log()) / 2), rel=1e-5)


@pytest.mark.parametrize("asked", [0, 5])
def test_generated_as_the_model_does(model: Any, asked: int) -> None:
    questions = [tokens(asked) for _ in ROWS]
    prompt = Prompt.read(model, ROWS)
    with Full().compress(prompt) as held:
        found = generate(prompt, held.fork(), questions, [12, 3, 12], [lambda ids: False] * 3)
        short = generate(prompt, held.fork(), questions, [12, 12, 12], [lambda ids: len(ids) >= 2] * 3)
    for row, question, answer, limit in zip(ROWS, questions, found, (12, 3, 12), strict=True):
        ids = torch.tensor([[*row, *question]])
        out = model.generate(ids, max_new_tokens=limit, do_sample=False)
        assert answer == out[0, ids.shape[1] :].tolist()
    assert short == [answer[:2] for answer in found]


def test_an_end_token_ends_its_row(model: Any) -> None:
    prompt = Prompt.read(model, ROWS)
    with Full().compress(prompt) as held:
        free = generate(prompt, held.fork(), [()] * 3, [8] * 3, [lambda ids: False] * 3)
        model.generation_config.eos_token_id = free[1][2]
        ended = generate(prompt, held.fork(), [()] * 3, [8] * 3, [lambda ids: False] * 3)
    at = [row.index(free[1][2]) if free[1][2] in row else 8 for row in free]
    assert ended == [row[:end] for row, end in zip(free, at, strict=True)]
    assert len(ended[1]) <= 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_records(model: Any, tiny_tokenizer: PreTrainedTokenizerFast, protocol: Protocol) -> None:
    samples = [sample(0), sample(1), sample(2, judge=None)]
    batch = Batch(model, tiny_tokenizer, samples, protocol, Kinds(reference_tokens=4, answer_tokens=3))
    full, ours = batch.records(FULL), batch.records(Cell(Ours("ours"), 0.4))
    length = 45 if protocol == "seen" else 40
    for row in full:
        assert (row["retention"], row["agreement"], row["kl"]) == (1.0, 1.0, 0.0)
        assert row["bytes"] == row["full_bytes"] == 2 * 2 * 2 * 16 * length * 2  # K and V, L, H, D, T, 16 bits
        assert "heads" not in row
    for row, made in zip(ours, samples, strict=True):
        assert row["fits"]
        assert 0.2 < row["retention"] <= 0.4
        assert row["kl"] > 0
        assert ("score" in row) == (made.judge is not None)
        assert sum(row["value_bits"].values()) == pytest.approx(1, abs=1e-4)
        assert ("heads" in row) == (made.index < 2)
    assert 1 <= len(ours[0]["text"]) <= 3  # a byte is a token
    assert [len(ours[0]["heads"]), len(ours[0]["heads"][0]), len(ours[0]["positions"][0])] == [2, 2, 32]


def test_kinds(model: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    forced = Batch(model, tiny_tokenizer, [sample(0)], "seen", Kinds(generated=False)).records(FULL)[0]
    generated = Batch(model, tiny_tokenizer, [sample(0)], "seen", Kinds(forced=False)).records(FULL)[0]
    assert {"kl", "accuracy"} <= forced.keys()
    assert "score" not in forced
    assert {"score", "text"} <= generated.keys()
    assert "kl" not in generated


def test_a_budget_that_cannot_be_had(model: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    batch = Batch(model, tiny_tokenizer, [sample(0), sample(1)], "seen", Kinds())
    rows = batch.records(Cell(Ours("q", {"allocator": "quantization"}), 0.05))
    assert [row["fits"] for row in rows] == [False, False]
    assert "budget" in rows[0]["why"]


@dataclass(frozen=True)
class Halved:
    """A peer with a cache of its own kind: a full one that forgot every second token."""

    name: str = "halved"
    settings: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def compress(self, prompt: Prompt, budget: float) -> Iterator[Compressed]:
        cache = DynamicCache()
        for seen in prompt.recording.observations:
            cache.update(seen.keys[:, :, ::2], seen.values[:, :, ::2], seen.layer)
        yield Compressed(cache, full_nbytes(prompt) // 2, full_nbytes(prompt))


def test_a_peer_beside_ours(model: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A cache that says it is shorter: later tokens still have the positions after the whole prompt."""
    made = sample(0)
    batch = Batch(model, tiny_tokenizer, [made], "after", Kinds())
    (row,) = batch.records(Cell(Halved(), 0.5))
    assert row["retention"] == 0.5
    assert row["kl"] > 0
    assert "value_bits" not in row
    with Halved().compress(batch.prompt, 0.5) as held:
        found = answer_logits(batch.prompt, held.fork(), [made.question], [made.answer])[0]
        ids = torch.tensor([[*made.question, *made.answer[:-1]]])
        positions = torch.arange(40, 40 + ids.shape[1])[None]
        with torch.no_grad():
            logits = model(ids, past_key_values=held.fork(), position_ids=positions).logits[0]
        assert torch.equal(found, logits[len(made.question) - 1 :])
        assert held.cache.get_seq_length() == 20  # as it was before two forks of it went on
