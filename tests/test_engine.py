"""The engine: the same tokens as ``model.generate``, whatever else is in the batch; documents asked many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from harness import reachable_tensors, storage_bytes

import rdkv
from rdkv.kernels.tail import CAPACITY
from rdkv.runtime.engine.engine import CompressedPrompt, Engine
from rdkv.runtime.engine.sampling import Sampling
from rdkv.runtime.errors import ConfigError, UnsupportedModelError

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"]
LENGTHS = [40, 33, 7, 1]
DOCUMENT = list(range(3, 200, 3))


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 259, (n,), generator=generator).tolist() for n in lengths]


def config(budget: float = 0.3, **settings: Any) -> rdkv.CompressionConfig:
    return rdkv.CompressionConfig(budget=budget, **settings)


def by_generate(model: Any, ids: list[int], budget: float, tokens: int, first: list[int] | None = None) -> list[int]:
    """New tokens of ``model.generate``; what is in ``first`` is compressed before ``ids`` are seen."""
    rdkv.attach(model)
    cache = rdkv.CompressedCache(model.config, config(budget))
    whole = torch.tensor([(first or []) + ids])
    if first:
        with torch.no_grad():
            model(torch.tensor([first]), past_key_values=cache)
    out = model.generate(whole, past_key_values=cache, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    new: list[int] = out[0, whole.shape[1] :].tolist()
    return new


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Engine:
    return Engine(tiny_model("llama"), config(), tiny_tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [0.05, 0.3, 1.0])
def test_tokens_are_those_of_generate(family: str, budget: float, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(family)
    answers = Engine(model, config(budget)).generate(prompts(), Sampling(max_new_tokens=12))
    for answer, ids in zip(answers, prompts(), strict=True):
        assert list(answer.tokens) == by_generate(model, ids, budget, 12)
        assert (answer.finish, answer.text) == ("length", "")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [0.001, 0.3, 1.0])
def test_a_document_is_asked_many_questions(family: str, budget: float, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(family)
    engine = Engine(model, config(budget))
    document = engine.compress(DOCUMENT)
    assert document.tokens == len(DOCUMENT)
    questions = [[], *prompts([5, 1, 9], seed=1)]
    for _ in range(2):  # the first time has left no trace
        answers = engine.generate(questions, Sampling(max_new_tokens=8), after=document)
        for answer, question in zip(answers[1:], questions[1:], strict=True):
            assert list(answer.tokens) == by_generate(model, question, budget, 8, DOCUMENT)
        assert list(answers[0].tokens) == by_generate(model, DOCUMENT, budget, 8)
    assert document.cache.get_seq_length() == len(DOCUMENT)
    rdkv.attach(model)
    whole = torch.tensor([DOCUMENT + questions[1]])
    out = model.generate(whole, past_key_values=document.cache.fork(), max_new_tokens=8, do_sample=False)
    assert out[0, whole.shape[1] :].tolist() == list(answers[1].tokens)


def test_documents_of_their_own(engine: Engine) -> None:
    documents = [engine.compress(ids) for ids in prompts([50, 20], seed=2)]
    questions = prompts([4, 4], seed=3)
    together = engine.generate(questions, after=documents)
    alone = [engine.generate([q], after=d)[0] for q, d in zip(questions, documents, strict=True)]
    assert together == alone
    mixed = engine.generate([*questions, questions[0]], after=[documents[0], *documents])  # one of them twice
    assert (mixed[0], mixed[1:]) == (alone[0], engine.generate([questions[1], questions[0]], after=documents))


def test_a_cloned_prompt_is_stored_once(engine: Engine) -> None:
    from rdkv.runtime.engine.batch import Batch

    document = engine.compress(DOCUMENT)
    one, many = Batch([document.cache]), Batch([document.cache.fork() for _ in range(8)])

    def packed(batch: Batch) -> int:
        return storage_bytes(tensor for layer in batch.layers for _, part in layer.parts for tensor in part.tensors())

    tables = document.cache.prompt_nbytes // 2
    assert packed(many) < packed(one) + 8 * tables
    shared = {t.data_ptr() for t in reachable_tensors(many.layers[0].parts)}
    assert {t.data_ptr() for t in reachable_tensors(one.layers[0].parts)} & shared


def test_prompts_of_which_nothing_is_kept_are_no_part(engine: Engine) -> None:
    from rdkv.runtime.engine.batch import Batch

    rows = prompts([40, 2, 33])
    together = Batch([engine.compress(ids).cache for ids in rows])
    for layer in together.layers:
        ((held, segment),) = layer.parts
        assert isinstance(held, torch.Tensor)
        assert held.tolist() == [0, 2]
        assert segment.nbytes > 0
    whole = Sampling(max_new_tokens=8)
    assert engine.generate(rows, whole) == [engine.generate([ids], whole)[0] for ids in rows]


def test_past_the_capacity_of_the_tail(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    count = CAPACITY + 20
    (answer,) = Engine(model, config()).generate(prompts([30]), Sampling(max_new_tokens=count))
    assert list(answer.tokens) == by_generate(model, prompts([30])[0], 0.3, count)


@pytest.mark.parametrize("budget", [0.02, 0.3, 1.0])
def test_16_bit_model(budget: float, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", torch.bfloat16)
    engine = Engine(model, config(budget))
    together = engine.generate(prompts(), Sampling(max_new_tokens=8))
    assert [len(answer.tokens) for answer in together] == [8] * len(LENGTHS)
    for answer, ids in zip(together, prompts(), strict=True):
        expected = by_generate(model, ids, budget, 8)
        assert list(answer.tokens)[:2] == expected[:2]  # later ones hang on the last bit


def test_seeds_are_the_sequences_own(engine: Engine) -> None:
    sampled = Sampling(temperature=1.5, top_p=0.95, top_k=100, min_p=0.001, seed=1, max_new_tokens=12)
    rows = prompts()
    settings = [sampled, Sampling(max_new_tokens=12), sampled, Sampling(temperature=1.0, seed=5, max_new_tokens=12)]
    together = engine.generate(rows, settings)
    for ids, own, answer in zip(rows, settings, together, strict=True):
        assert engine.generate([ids], own)[0] == answer
    other = engine.generate(rows[:1], Sampling(temperature=1.5, seed=2, max_new_tokens=12))[0]
    assert other != together[0]
    first, second = engine.generate([rows[0]] * 2, Sampling(temperature=1.5, max_new_tokens=12))
    assert first != second  # without a seed each draws its own


def test_pieces_make_the_answers(engine: Engine) -> None:
    texts = ["The quick brown fox", "jumps over", "the lazy dog. " * 4]
    settings = [Sampling(max_new_tokens=n) for n in (3, 9, 6)]
    whole = engine.generate(texts, settings)
    pieces = list(engine.stream(texts, settings))
    for index, answer in enumerate(whole):
        own = [piece for piece in pieces if piece.index == index]
        assert tuple(piece.token for piece in own) == answer.tokens
        assert "".join(piece.text for piece in own) == answer.text
        assert [piece.finish for piece in own] == [None] * (len(own) - 1) + ["length"]
    assert [len(answer.tokens) for answer in whole] == [3, 9, 6]


def test_stops(engine: Engine, tiny_tokenizer: Any) -> None:
    ids = prompts([30])
    (free,) = engine.generate(ids, Sampling(max_new_tokens=20))
    last = next(i for i in range(1, 20) if free.tokens[i] not in free.tokens[:i])
    stop = free.tokens[last]
    (stopped,) = engine.generate(ids, Sampling(max_new_tokens=20, stop_token_ids=(stop,)))
    assert (stopped.tokens, stopped.finish) == (free.tokens[: last + 1], "stop")
    engine.model.generation_config.eos_token_id = [1, stop]
    try:
        assert engine.generate(ids, Sampling(max_new_tokens=20)) == [stopped]
        assert engine.generate(ids, Sampling(max_new_tokens=20, ignore_eos=True)) == [free]
    finally:
        engine.model.generation_config.eos_token_id = None


def test_unsupported_models_are_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="sliding"):
        Engine(tiny_model("mistral", sliding_window=8), config())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": []}, "prompts is a list"),
        ({"prompts": "text"}, "prompts is a list"),
        ({"prompts": [[]]}, "a prompt is empty"),
        ({"prompts": [[5, 300]]}, "token id 300 is not one of the model's 259"),
        ({"prompts": [[5] * 600]}, "the prompt has 600 tokens, but the model's window is 512"),
        ({"prompts": [[5] * 500]}, "ask for at most 12 new tokens"),
        ({"prompts": [[5]], "sampling": [Sampling()] * 2}, "sampling has 2 entries for 1 prompts"),
        ({"prompts": ["text"]}, "no tokenizer; give prompts as token ids"),
        ({"prompts": [[5]], "sampling": Sampling(stop=("a",))}, "no tokenizer, which stop texts need"),
    ],
)
def test_what_is_refused(engine: Engine, arguments: dict[str, Any], words: str) -> None:
    blind = Engine(engine.model, config())
    with pytest.raises(ConfigError, match=words):
        blind.generate(**arguments)


def test_window_counts_what_came_before(engine: Engine) -> None:
    document = engine.compress([5] * 450)
    with pytest.raises(ConfigError, match="has 455 tokens"):
        engine.stream([[5] * 5], after=document)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        engine.compress([])
    with pytest.raises(ConfigError, match="a prompt is empty"):
        engine.generate([[]], after=CompressedPrompt(document.cache, None))
