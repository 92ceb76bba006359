"""Two kinds of score of a cache: teacher-forced on the reference answer, and of an answer that is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from rdkv.runtime.engine.answer import end_tokens

from .method import Prompt


@dataclass(frozen=True)
class Forced:
    """Teacher-forced scores, each a mean over the answer's tokens.

    Attributes:
        accuracy: share of tokens that are the likeliest.
        agreement: share of tokens where the likeliest one is the full cache's.
        kl: Kullback-Leibler divergence of the distribution from the full cache's, in nats.
        nll: negative log-likelihood of the answer, in nats.
    """

    accuracy: float
    agreement: float
    kl: float
    nll: float


@torch.no_grad()
def answer_logits(
    prompt: Prompt, cache: Cache, asked: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Logits ``[n, V]`` for the ``n`` tokens of each answer, after the question; ``cache`` is used up.

    The first token after the prompts has the logits of the pass over them, which no compression changes.
    """
    rows = [[*question, *answer[:-1]] for question, answer in zip(asked, answers, strict=True)]
    logits = prompt.logits.unsqueeze(1)
    if longest := max(map(len, rows)):
        # Padded on the right: later tokens change nothing for earlier ones.
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=prompt.ids.device)
        logits = torch.cat([logits, _continue(prompt, cache, ids, 0)], 1)
    spans = [(len(question), len(question) + len(answer)) for question, answer in zip(asked, answers, strict=True)]
    return [row[begin:end] for row, (begin, end) in zip(logits, spans, strict=True)]


def compare(logits: Tensor, full: Tensor, answer: Sequence[int]) -> Forced:
    """Scores of ``logits`` ``[n, V]`` beside the full cache's on the ``n`` tokens of an answer."""
    truth = torch.tensor(list(answer), device=logits.device)
    p, q = full.float().log_softmax(-1), logits.float().log_softmax(-1)
    best = q.argmax(-1)
    return Forced(
        accuracy=(best == truth).float().mean().item(),
        agreement=(best == p.argmax(-1)).float().mean().item(),
        kl=(p.exp() * (p - q)).sum(-1).mean().item(),
        nll=-q.gather(1, truth[:, None]).mean().item(),
    )


@torch.no_grad()
def generate(
    prompt: Prompt, cache: Cache, asked: Sequence[Sequence[int]], limits: Sequence[int],
    finished: Sequence[Callable[[list[int]], bool]],
) -> list[list[int]]:  # fmt: skip
    """Greedy answers, in tokens; ``cache`` is used up.

    Args:
        asked: tokens before the answers, equally many in each row.
        limits: tokens that each answer may have.
        finished: called with an answer's tokens so far, whether to stop there.
    """
    logits, done_tokens, ends = prompt.logits, 0, end_tokens(prompt.model)
    if asked[0]:
        questions = torch.tensor([list(row) for row in asked], device=prompt.ids.device)
        logits, done_tokens = _continue(prompt, cache, questions, 0)[:, -1], len(asked[0])
    answers: list[list[int]] = [[] for _ in limits]
    open_rows = set(range(len(limits)))
    while True:
        tokens = logits.argmax(-1)
        for row, token in enumerate(tokens.tolist()):
            if row not in open_rows:
                continue
            if token not in ends:
                answers[row].append(token)
            if token in ends or len(answers[row]) >= limits[row] or finished[row](answers[row]):
                open_rows.discard(row)
        if not open_rows:
            return answers
        logits = _continue(prompt, cache, tokens[:, None], done_tokens)[:, -1]
        done_tokens += 1


def _continue(prompt: Prompt, cache: Cache, ids: Tensor, after: int) -> Tensor:
    """Logits ``[B, n, V]`` of ``ids`` ``[B, n]``, ``after`` tokens behind the prompts."""
    begin = prompt.ids.shape[1] + after
    positions = torch.arange(begin, begin + ids.shape[1], device=ids.device)[None]
    logits: Tensor = prompt.model(ids, past_key_values=cache, position_ids=positions, use_cache=True).logits
    return logits
