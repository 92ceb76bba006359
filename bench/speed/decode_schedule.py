"""Time of a serving step of one layer: packed prompts in an arena, the tokens after them scattered over a pool.

    python -m bench.speed.decode_schedule --out results.jsonl --tokens 32768 --batch 64 --budget 0.05 --mix smollm2

Prompts are synthetic (`bench.speed.synthetic`); a step's new tokens lie side by side in the pool, as a server that
decodes a batch puts them. What plans the step for all layers, which is launched once, is timed apart (``update_us``).
Beside it the same tokens at 16 bits by other libraries. Nothing is timed whose output is wrong.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from rdkv.kernels import naive, naive_decode
from rdkv.kernels.arena import Arena
from rdkv.kernels.arena_shape import EVEN, ArenaShape
from rdkv.kernels.decode import attend
from rdkv.kernels.decode_schedule import Schedule
from rdkv.kernels.packed import Packed

from . import baselines, timing
from .attention import relative_error
from .cases import Case, Shape, cases, parser, several
from .synthetic import synthesize

CHECKED_TOKENS = 4096  # of two prompts, once for every budget and mix
LAYERS = 32  # that a step is planned for


@dataclass(frozen=True)
class Batch:
    """Sequences that decode: the same prompt in places of their own, and tails of new tokens.

    Attributes:
        prompt: what every place holds, for the check; pages: ``[B, tokens + tail]`` int32 of the pools' tokens.
        pools: keys and values ``[N, H, D]`` of each of the arena's layers.
    """

    prompt: Packed
    arena: Arena
    schedule: Schedule
    places: Tensor
    lengths: Tensor
    pages: Tensor
    pools: list[tuple[Tensor, Tensor]]

    def update(self) -> None:
        """Plan a step."""
        self.schedule.update(self.places, self.lengths, self.pages.stride(0))

    def step(self, query: Tensor, layer: int, dtype: torch.dtype) -> Tensor:
        """Attention of ``query`` ``[B, H_q, 1, D]`` in a layer."""
        tail = self.schedule.tail(*self.pools[layer], self.pages, self.places)
        packed, plan = self.arena.layers[layer], self.schedule.plans[layer]
        return attend(query, packed, plan, packed.dim**-0.5, tail, dtype)[0]


def make_batch(case: Case, tail: int, layers: int, device: str) -> Batch:
    """A batch of a case with ``tail`` tokens after every prompt."""
    shape = case.shape
    one = dataclasses.replace(case, shape=dataclasses.replace(shape, batch=1))
    prompt = synthesize(1, shape.heads, one.sizes(), device, torch.bfloat16)
    empty = ArenaShape((EVEN,) * layers, shape.heads, shape.dim, prompt.span, torch.bfloat16, shape.batch, 0)
    region = empty.layer_bytes(sum(t.nbytes for t in prompt.tensors()))
    arena = Arena(dataclasses.replace(empty, nbytes=region * shape.batch), torch.device(device))
    for layer, place in product(range(layers), range(shape.batch)):
        arena.write(layer, place, slice(place * region, (place + 1) * region), prompt)
    arena.prompt_tokens.fill_(shape.tokens)
    places = torch.arange(shape.batch, device=device)
    steps = torch.arange(tail, dtype=torch.int32, device=device)
    pages = torch.zeros(shape.batch, shape.tokens + tail, dtype=torch.int32, device=device)
    pages[:, shape.tokens :] = 1 + steps * shape.batch + places[:, None].int()

    def pool() -> Tensor:
        size = (1 + tail * shape.batch, shape.heads, shape.dim)
        return torch.empty(size, dtype=torch.bfloat16, device=device).normal_()

    pools = [(pool(), pool()) for _ in range(layers)]
    lengths = torch.full_like(places, shape.tokens + tail)
    return Batch(prompt, arena, Schedule(arena, shape.batch), places, lengths, pages, pools)


def make_query(shape: Shape, device: str) -> Tensor:
    """``[B, H * G, 1, D]``."""
    return torch.randn(shape.batch, shape.heads * shape.group, 1, shape.dim, device=device).bfloat16()


@torch.no_grad()
def checked_error(case: Case, device: str) -> float:
    """Relative error of the float32 output against plain PyTorch.

    Raises:
        ValueError: see `relative_error`.
    """
    shape, scale = case.shape, case.shape.dim**-0.5
    batch, query = make_batch(case, 300, 1, device), make_query(shape, device)
    batch.update()
    output = batch.step(query, 0, torch.float32)
    truth = torch.empty_like(output)
    for i, slots in enumerate(batch.pages[:, shape.tokens :].long()):
        keys, values = (pool[slots].transpose(0, 1).unsqueeze(0) for pool in batch.pools[0])
        states = naive.attention(query[i : i + 1], keys, values, scale)
        states = naive.merge_states(*states, *naive_decode.attend(query[i : i + 1], batch.prompt, scale))
        truth[i : i + 1] = states[0]
    return relative_error(output, truth)


@torch.no_grad()
def measure(case: Case, tail: int, bandwidth: float, device: str) -> dict[str, Any]:
    """Time of a step, and what it moves; the L2 cache never has what it reads."""
    shape = case.shape
    new = 4 * shape.batch * shape.heads * shape.dim * tail
    layers = timing.copies(case.sizes().nbytes + new)
    batch, query = make_batch(case, tail, layers, device), make_query(shape, device)
    batch.update()
    us = timing.microseconds(lambda layer: batch.step(query, layer, torch.bfloat16), range(layers))
    moved = shape.batch * sum(t.nbytes for t in batch.prompt.tensors()) + new + 2 * query.nbytes
    floor = 1e6 * moved / bandwidth
    del batch.pools[:]
    small = dataclasses.replace(case, shape=dataclasses.replace(shape, tokens=1024))
    model = make_batch(small, 1, LAYERS, device)
    return {
        "us": round(us, 2),
        "moved_bytes": moved,
        "tail_bytes": new,
        "floor_us": round(floor, 2),
        "share_of_copy": round(floor / us, 4),
        "update_us": round(timing.microseconds(Batch.update, [model]), 2),
        "update_layers": LAYERS,
        "items": int((batch.schedule.plans[0].items[:, 2] < batch.schedule.plans[0].items[:, 3]).sum()),
    }


def results(chosen: list[Case], tails: list[int], bandwidth: float, others: bool, device: str) -> Iterator[Any]:
    """A record for each case and length of tails; what could not be timed has the reason in place of the time."""
    error = cache(checked_error)
    for case, tail in product(chosen, tails):
        shape = case.shape
        small = dataclasses.replace(case, shape=dataclasses.replace(shape, batch=2, tokens=CHECKED_TOKENS))
        record: dict[str, Any] = {"kind": "decode_schedule", **dataclasses.asdict(shape), "tail": tail}
        record |= {"mix": case.mix, "budget": case.budget, "us": None, "reason": None}
        try:
            record["error"] = error(small, device)
            record |= measure(case, tail, bandwidth, device)
        except Exception as problem:  # no memory, too small a budget, a wrong output, a kernel that does not compile
            record["reason"] = baselines.short(problem)
        torch.cuda.empty_cache()
        if others:
            record |= baselines.full_cache(dataclasses.replace(shape, tokens=shape.tokens + tail), device)
        yield record


def main() -> None:
    """The command line."""
    command = parser(__doc__)
    command.add_argument("--tails", type=several(int), default=[64, 2048, 4096])
    arguments = command.parse_args()
    bandwidth, way = timing.copy_bandwidth()
    machine = timing.machine() | {"copy_bytes_per_s": round(bandwidth), "copy_by": way}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as out:
        for record in results(cases(arguments), arguments.tails, bandwidth, not arguments.no_baselines, "cuda"):
            out.write(json.dumps(record | machine) + "\n")
            out.flush()
            print({k: v for k, v in record.items() if k not in ("kind", "heads", "group", "dim")}, flush=True)


if __name__ == "__main__":
    main()
