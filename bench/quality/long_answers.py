"""What compressing an answer as it grows costs: long texts, teacher-forced, with several sizes of block.

    python -m bench.quality.long_answers --model smollm2-135m --texts DIR --out results.jsonl --blocks 256 512 1024

Each document is a stretch of the text files of ``DIR``. Its first tokens are a prompt that the engine reads and
compresses; the rest are forced as its answer, one decode step each, while the tails are compressed in blocks
(``tail_block``; 0 for none). Beside each step is the full cache at the same position: one forward pass over the whole
document. All sizes of block see the same documents. The table is that of `bench.quality.report.long_answers`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from rdkv import CompressionConfig
from rdkv.runtime.engine.batch import Batch
from rdkv.runtime.engine.engine import Engine
from rdkv.runtime.engine.runner import Runner
from rdkv.runtime.engine.sampling import Sampling
from rdkv.runtime.full_generation import now
from rdkv.runtime.loading import load_model
from rdkv.runtime.storage import storage_bytes

from .report.long_answers import SPAN, table

Record = dict[str, Any]
TIMED = 50  # steps after the documents' end, for the time of one


class Forced(Runner):
    """Reads given tokens, whatever it would choose.

    Attributes:
        logits: ``[B, V]``, those of the last step.
    """

    def force(self, script: Tensor) -> None:
        """Read ``script`` ``[B, N]``, a column a step; the last one again in steps beyond."""
        self._script, self._at = script, torch.zeros(1, dtype=torch.int64, device=script.device)
        self.tokens.copy_(script[:, 0])
        self.logits = torch.zeros(0)

    def _advance(self) -> None:
        self.batch.advance()
        logits = self._forward.step(self.tokens, self.batch)
        if not len(self.logits):
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        self._at.add_(1).clamp_(max=self._script.shape[1] - 1)
        self.tokens.copy_(self._script.index_select(1, self._at)[:, 0])


def documents(tokenizer: Any, folder: Path, count: int, length: int) -> Tensor:
    """``[count, length]`` tokens, from places spread evenly over the folder's text files.

    Raises:
        SystemExit: the texts are too short.
    """
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]
    if len(ids) < count * length:
        raise SystemExit(
            f"{folder}: its text files have {len(ids):,} tokens; {count} documents take {count * length:,}"
        )
    stride = (len(ids) - length) // max(count - 1, 1)
    return torch.tensor([ids[i * stride : i * stride + length] for i in range(count)])


@torch.inference_mode()
def divergence(full: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence in nats, and whether the likeliest token is the same: ``[2, B]``."""
    p, q = full.float().log_softmax(-1), logits.float().log_softmax(-1)
    return torch.stack([(p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).float()])


@torch.inference_mode()
def full_logits(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """Logits ``[B, N, V]`` after each token of the answers, with the full cache."""
    answer = ids.shape[1] - prompt
    return torch.cat([model(row[None], use_cache=False, logits_to_keep=answer).logits for row in ids])


@torch.inference_mode()
def measure(engine: Engine, ids: Tensor, prompt: int, full: Tensor) -> Record:
    """Scores of every position, ``[N][B]``, bytes at the end and the time of a step."""
    handles = [engine.compress(row[:prompt].tolist()) for row in ids]
    logits = torch.stack([handle.logits for handle in handles if handle.logits is not None])
    batch = Batch([handle.cache for handle in handles], engine.tail_block)
    del handles
    runner = Forced(engine.forward, batch, logits, [Sampling()] * len(ids))
    runner.force(ids[:, prompt:])
    scores = []
    for position in range(full.shape[1]):
        runner.step()
        scores.append(divergence(full[:, position], runner.logits))
    kl, same = torch.stack(scores, 1).cpu()
    held = storage_bytes(t for layer in batch.layers for t in (layer.keys, layer.values))
    packed = storage_bytes(t for layer in batch.layers for _, part in layer.parts for t in part.tensors())
    times = []
    for _ in range(TIMED):
        begin = now(ids.device.type)
        runner.step()
        times.append(1000 * (now(ids.device.type) - begin))
    step = median(times)  # a block that is compressed meanwhile is not in it
    return {"kl": kl.tolist(), "same": same.tolist(), "tail_bytes": held, "packed_bytes": packed, "step_ms": step}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True)
    made.add_argument("--texts", type=Path, required=True, help="folder of .txt files")
    made.add_argument("--out", type=Path, required=True, help="file of JSON lines, which is added to")
    made.add_argument("--documents", type=int, default=6)
    made.add_argument("--prompt", type=int, default=2048, help="tokens")
    made.add_argument("--answer", type=int, default=3072, help="tokens")
    made.add_argument("--budgets", type=float, nargs="+", default=[0.05])
    made.add_argument("--blocks", type=int, nargs="+", default=[0, 256, 512, 1024], help="0 for none")
    made.add_argument("--device", default="auto")
    made.add_argument("--dtype", default="auto")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every budget and block, and print the table."""
    options = parser().parse_args(arguments)
    loaded = load_model(options.model, options.device, options.dtype)
    length = options.prompt + options.answer
    ids = documents(loaded.tokenizer, options.texts, options.documents, length).to(loaded.device)
    full = full_logits(loaded.model, ids, options.prompt)
    records: list[Record] = []
    for budget in options.budgets:
        for block in options.blocks:
            engine = Engine(loaded.model, CompressionConfig(budget=budget), tail_block=block or None)
            record = measure(engine, ids, options.prompt, full)
            record |= {"kind": "long answers", "model": options.model, "budget": budget, "block": block}
            record |= {"prompt": options.prompt, "answer": options.answer, "full_bytes": full_bytes(loaded.model, ids)}
            record |= {"device": torch.cuda.get_device_name() if ids.is_cuda else "cpu", "dtype": loaded.dtype}
            records.append(compact(record))
            with options.out.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
    print(table(records))


def compact(record: Record) -> Record:
    """The record with its scores as means of `SPAN` positions, which is what a line of results can hold."""
    means = {
        name: [[round(v, 5) for v in part.mean(0).tolist()] for part in torch.tensor(record[name]).split(SPAN)]
        for name in ("kl", "same")
    }
    return record | means | {"step_ms": round(record["step_ms"], 3)}


def full_bytes(model: Any, ids: Tensor) -> int:
    """Bytes of a full 16-bit cache of the documents."""
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(4 * config.num_hidden_layers * config.num_key_value_heads * dim * ids.numel())


if __name__ == "__main__":
    main()
