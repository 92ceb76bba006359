"""What a model's answers lose when one head alone is compressed: which layers and heads need the bytes most.

Heads differ by orders of magnitude, and the losses of all add up to that of the whole model, nearly: bytes are worth
most where one head's compression changes most.
"""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING

from .attention import attach
from .config import CompressionConfig
from .errors import ConfigError
from .plan import BitPlan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

    from .interfaces import PackedSegment
    from .loading import LoadedModel
    from .observation import Observation
    from .pipeline import Pipeline

logger = logging.getLogger("rdkv")

ANSWER = 64  # tokens that are compared
CUE = 32  # tokens at the end of a prompt that ask for what was read before
FACTS = 12  # in a prompt, some eleven tokens each, unless they are more than half of it
LEAST = 8 * CUE + 2 * ANSWER  # tokens of a prompt
BUDGET = 0.0248  # tight enough that every layer loses something


def sensitivity(loaded: LoadedModel, text: str, tokens: int = 2048, prompts: int = 12) -> tuple[tuple[float, ...], ...]:
    """Share of each KV head in what compression costs, ``[L][H]``, sums to 1.

    Prompts of the text are read with the full cache, and each layer is planned by the defaults. Then one head after
    the other is packed by that plan, all others kept whole, and the Kullback-Leibler divergence from the full cache is
    taken over the next tokens. They are, in turn, what the text goes on with, an earlier passage whose first tokens end
    the prompt, and facts that stand between parts of the text, in another order. Each prompt counts the same.

    Args:
        loaded: the model; rdkv's attention stays attached.
        text: as long as all prompts, or they overlap.
        tokens: of a prompt, answer included.
        prompts: how many.

    Raises:
        ConfigError: the text is too short.
    """
    import torch

    attach(loaded.model)
    ids = torch.tensor(loaded.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if len(ids) < tokens or tokens < LEAST:
        raise ConfigError(
            f"the text has {len(ids)} tokens; which heads need the bytes takes prompts of {tokens}, "
            f"at least {LEAST}: give a longer text and more --tokens, or leave heads out (--prompts 0)"
        )
    logger.info("measuring what each head costs; number of prompts: %d", prompts)
    starts = torch.linspace(0, len(ids) - tokens, prompts).long().tolist()
    losses = [
        _losses(loaded.model, _prompt(ids[start : start + tokens], i, prompts, loaded.tokenizer))
        for i, start in enumerate(starts)
    ]
    shares = torch.stack([loss / loss.sum().clamp_min(1e-30) for loss in losses]).mean(0)
    return tuple(map(tuple, shares.tolist()))


def _prompt(ids: Tensor, index: int, prompts: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """A prompt of as many tokens as ``ids``, its last `ANSWER` the answer."""
    import torch

    if index % 3 == 0:
        return ids
    first = ids[: len(ids) - CUE - ANSWER]
    if index % 3 == 1:
        start = (len(first) - CUE - ANSWER) * (index + 1) // (prompts + 2)
        return torch.cat([first, first[start : start + CUE + ANSWER]])
    facts = _facts(index)
    told = [torch.tensor(tokenizer(fact, add_special_tokens=False).input_ids) for fact in facts]
    told = told[: len(ids) // 2 // max(map(len, told))]  # a tokenizer of bytes takes three times as many
    asked = torch.cat(random.Random(index).sample(told, len(told)))[: CUE + ANSWER]
    room = len(ids) - len(asked) - sum(map(len, told))
    pieces = ids[:room].tensor_split(len(told) + 1)
    return torch.cat([pieces[0], *(part for pair in zip(told, pieces[1:], strict=True) for part in pair), asked])


def _facts(seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        f"\nThe code of item {item} is {draw.randint(10000, 99999)}." for item in draw.sample(range(100, 1000), FACTS)
    ]


def _losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Divergence from the full cache with each head alone compressed, ``[L, H]`` float64, in nats a token."""
    import torch

    from .cache import CompressedCache
    from .pipeline import Pipeline
    from .recording import Recording
    from .session import Group

    ids = ids.to(model.device).unsqueeze(0)
    prompt, answer = ids[:, :-ANSWER], ids[:, -ANSWER:]
    config = CompressionConfig(budget=BUDGET, calibration="none")
    recording, pipeline = Recording(model.config), Pipeline(model.config, config)
    packed_layers = CompressedCache.for_stored(model.config, config).compressed_layers
    with torch.inference_mode():
        model(prompt, past_key_values=recording, use_cache=True, logits_to_keep=1)
        truth = _log_probabilities(model, recording.full(), answer)  # [1, ANSWER, V]
        losses = []
        for observation, layer in zip(recording.observations, packed_layers, strict=True):
            nothing = observation.keys[:, :, :0]  # comes after the prompt
            for segment in _heads_alone(pipeline, observation):
                layer.resume(observation.tokens, [Group([0], 0)], [segment], None, (nothing, nothing))
                cache = recording.full()
                cache.layers[observation.layer] = layer
                found = _log_probabilities(model, cache, answer)
                losses.append((truth.exp() * (truth - found)).sum(-1).mean().double())
    return torch.stack(losses).clamp_min(0.0).view(len(recording.recorded), -1).cpu()


def _heads_alone(pipeline: Pipeline, observation: Observation) -> Iterator[PackedSegment]:
    """One layer with one head after the other packed by the plan, the others as they are."""
    pending = pipeline.score(observation)
    (planned,) = pipeline.allocate([pending])
    plan = planned.plan
    batch, heads, tokens, dim = pending.keys.shape
    for head in range(heads):
        alone = BitPlan.uniform((batch, heads, tokens, dim), 16, pending.keys.device)
        alone.value_bits[:, head], alone.key_bits[:, head] = plan.value_bits[:, head], plan.key_bits[:, head]
        alone.pinned[:, head] = plan.pinned[:, head]
        yield pipeline.format.pack(pending.keys, pending.values, alone)


def _log_probabilities(model: PreTrainedModel, cache: Cache, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, past_key_values=cache, use_cache=True).logits
    return logits.float().log_softmax(-1)
