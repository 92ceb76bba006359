"""Share of a prefill that compression takes: the same prompt with a plain cache and with a compressed one.

    python -m bench.speed.compress --out results.jsonl --tokens 32768 131072

The model has the shape of Llama-3.1-8B, few layers and random weights, in bfloat16; only the last position's logits
are made. Runs with either cache take turns; times are of the whole forward pass, with the device idle at both ends.
Packing a layer is finished behind the next one, and the last layer's within its own, where the device has nothing else
to do: its wait is one of ``--layers``, and of 32 in the model that is stood for. Eight keep that share small.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel
from transformers.cache_utils import Cache

import rdkv

from . import timing

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 262_144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}
Record = dict[str, Any]


def make_model(layers: int, device: str, **changes: Any) -> PreTrainedModel:
    """A model of random weights, made on its device."""
    torch.manual_seed(0)
    config = LlamaConfig(**(LLAMA_8B | changes), num_hidden_layers=layers)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.eval()


@torch.no_grad()
def prefill(model: PreTrainedModel, prompt: Tensor, cache: Cache) -> tuple[float, int]:
    """Seconds, and bytes at the peak beyond what was held before (0 where there is no GPU)."""
    on_gpu = prompt.is_cuda
    gc.collect()  # what earlier caches left
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, begin = torch.cuda.memory_allocated() if on_gpu else 0, time.perf_counter()
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return seconds, torch.cuda.max_memory_allocated() - before if on_gpu else 0


def compare(model: PreTrainedModel, tokens: int, budget: float, runs: int) -> Record:
    """Medians of prefills with both caches, after one of each that does not count."""
    prompt = torch.randint(model.config.vocab_size, (1, tokens), device=model.device)
    plain: list[tuple[float, int]] = []
    packed: list[tuple[float, int]] = []
    own: list[float] = []
    for _ in range(runs + 1):
        rdkv.detach(model)
        plain.append(prefill(model, prompt, DynamicCache(config=model.config)))
        rdkv.attach(model)
        cache = rdkv.CompressedCache(model.config, rdkv.CompressionConfig(budget=budget, calibration="none"))
        packed.append(prefill(model, prompt, cache))
        own.append(cache.compress_seconds / packed[-1][0])
        full_bytes, held_bytes = cache.full_nbytes, cache.nbytes
        del cache
    layers = model.config.num_hidden_layers
    plain_s, packed_s = (median(seconds for seconds, _ in found[1:]) for found in (plain, packed))
    return {
        "kind": "compress",
        "tokens": tokens,
        "layers": layers,
        "budget": budget,
        "runs": runs,
        "plain_s": round(plain_s, 4),
        "compressed_s": round(packed_s, 4),
        "ms_per_layer": round(1000 * (packed_s - plain_s) / layers, 3),
        "share": round((packed_s - plain_s) / plain_s, 4),
        "own_share": round(median(own[1:]), 4),
        "plain_peak_bytes": max(peak for _, peak in plain[1:]),
        "compressed_peak_bytes": max(peak for _, peak in packed[1:]),
        "full_bytes": full_bytes,
        "held_bytes": held_bytes,
    }


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--tokens", type=int, nargs="+", default=[32_768, 131_072])
    result.add_argument("--layers", type=int, default=8)
    result.add_argument("--budget", type=float, default=0.0248)
    result.add_argument("--runs", type=int, default=5)
    result.add_argument("--out", type=Path, required=True, help="file that lines are appended to")
    return result


def main() -> None:
    """The command line."""
    arguments = parser().parse_args()
    model, machine = make_model(arguments.layers, "cuda"), timing.machine()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as out:
        for tokens in arguments.tokens:
            record = compare(model, tokens, arguments.budget, arguments.runs)
            out.write(json.dumps(record | machine) + "\n")
            out.flush()
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
