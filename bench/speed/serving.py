"""SGLang under load, with compressed prompts and without: SGLang's own `bench_serving` on each server in turn.

    python -m bench.speed.serving --out results.jsonl --load 131072x128x24@2 --load 32768x4096x64@inf

The model has the shape of Llama-3.1-8B (fewer layers by ``--layers``) and dummy weights, which random prompts suit. A
load is ``INPUTxOUTPUTxREQUESTS@RATE``: tokens of each prompt and answer, how many, and how many arrive a second
(Poisson; ``inf``: all at once). Servers: stock SGLang with a 16-bit and with an fp8 cache, and rdkv at ``--budget``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ..machine import describe
from .compress import LLAMA_8B

START_SECONDS = 420
KEPT = (
    "completed", "duration", "request_throughput", "input_throughput", "output_throughput", "concurrency",
    "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "mean_itl_ms", "median_itl_ms", "p99_itl_ms", "mean_tpot_ms",
)  # fmt: skip
DECODING = re.compile(r"Decode batch, #running-req: (\d+),.*?gen throughput \(token/s\): ([\d.]+)")
LOAD = re.compile(r"(\d+)x(\d+)x(\d+)@(inf|[\d.]+)")


def make_model(folder: Path, layers: int) -> None:
    """A configuration of Llama-3.1-8B's shape, and a tokenizer with a word for every token."""
    more = {"num_hidden_layers": layers, "head_dim": 128, "max_position_embeddings": 140_000}
    more |= {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1}
    config = LlamaConfig(**(LLAMA_8B | more))
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config.vocab_size)}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t0", eos_token="t1").save_pretrained(folder)


def servers(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Flags of each server by name."""
    config = {"budget": arguments.budget, "arena": arguments.arena, "prefill": arguments.stock, "calibration": "none"}
    every = {
        "sglang-16bit": ["--attention-backend", arguments.stock],
        "sglang-fp8": ["--attention-backend", arguments.stock, "--kv-cache-dtype", "fp8_e4m3"],
        "rdkv": ["--attention-backend", "rdkv", "--rdkv-config", json.dumps(config)],
    }
    return {name: flags for name, flags in every.items() if name in arguments.server}


@contextmanager
def serving(folder: Path, flags: list[str], log: Path, most: int, port: int) -> Iterator[None]:
    """A server that answers, until the block ends."""
    command = [
        sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder), "--load-format", "dummy",
        "--port", str(port), "--disable-radix-cache", "--sampling-backend", "pytorch", "--cuda-graph-backend-prefill",
        "disabled", "--max-running-requests", str(most), "--cuda-graph-max-bs-decode", str(most), *flags,
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait(process, log, port)
            yield
        finally:
            process.terminate()
            process.wait(60)


def _wait(process: subprocess.Popen[bytes], log: Path, port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {_last_error(log)}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health_generate", timeout=20).read()
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(1)
    raise RuntimeError(f"the server did not answer within {START_SECONDS} s: {_last_error(log)}")


def _last_error(log: Path) -> str:
    errors = [line for line in log.read_text().splitlines() if "Error" in line]
    return errors[-1][:300] if errors else "no error in its log"


def measure(folder: Path, load: str, seconds: int, port: int) -> dict[str, Any]:
    """What `bench_serving` says of one load."""
    match = LOAD.fullmatch(load)
    assert match is not None, load
    given, made, requests, rate = match.groups()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.jsonl"
        command = [
            sys.executable, "-m", "sglang.benchmark.serving", "--backend", "sglang", "--host", "127.0.0.1",
            "--port", str(port), "--model", str(folder), "--dataset-name", "random-ids", "--tokenize-prompt",
            "--random-input-len", given, "--random-output-len", made, "--random-range-ratio", "1.0",
            "--num-prompts", requests, "--request-rate", rate, "--warmup-requests", "1", "--disable-tqdm",
            "--output-file", str(out), "--seed", "1",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        if not out.exists():
            raise RuntimeError(f"bench_serving: {(done.stderr or done.stdout).strip().splitlines()[-1][:300]}")
        record = json.loads(out.read_text().splitlines()[-1])
    return {name: record[name] for name in KEPT if name in record}


def busiest(log: str) -> dict[str, float]:
    """Most sequences that decoded at once, by a server's log, and their tokens a second while it was so many."""
    found = [(int(n), float(rate)) for n, rate in DECODING.findall(log)]
    most = max((n for n, _ in found), default=0)
    rates = [rate for n, rate in found if n == most]
    return {"most_running": most} | ({"decode_throughput": median(rates)} if most else {})


def capacity(log: str) -> str:
    """What a server says of its memory."""
    lines = [line for line in log.splitlines() if "rdkv: arena of" in line or "max_total_num_tokens=" in line]
    return " | ".join(line.partition("] ")[2][:220] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are added to this file")
    parser.add_argument("--load", action="append", required=True, metavar="INxOUTxN@RATE")
    parser.add_argument("--server", action="append", choices=["sglang-16bit", "sglang-fp8", "rdkv"])
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--arena", type=float, default=0.5)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--most", type=int, default=128, help="sequences at once, and one: a prompt in chunks is two")
    parser.add_argument(
        "--stock", default="triton", help="attention backend of the stock servers, and of all that reads prompts"
    )
    parser.add_argument("--port", type=int, default=30123, help="one for each bench that runs at the same time")
    parser.add_argument("--seconds", type=int, default=600, help="for one load")
    arguments = parser.parse_args()
    arguments.server = arguments.server or ["sglang-16bit", "sglang-fp8", "rdkv"]
    machine = describe()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        make_model(folder, arguments.layers)
        for name, flags in servers(arguments).items():
            log = arguments.out.with_suffix(f".{name}.log")
            for record in run_server(folder, name, flags, log, arguments):
                with arguments.out.open("a") as file:
                    file.write(json.dumps({"kind": "serving", "server": name, **record, **machine}) + "\n")
                print(json.dumps({"server": name, **record}), flush=True)


def run_server(
    folder: Path, name: str, flags: list[str], log: Path, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A record for each load; one with ``error`` for what fails."""
    shape = {"layers": arguments.layers, "budget": arguments.budget if name == "rdkv" else None}
    try:
        with serving(folder, flags, log, arguments.most, arguments.port):
            for load in arguments.load:
                before = len(log.read_text())
                try:
                    numbers = measure(folder, load, arguments.seconds, arguments.port)
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    numbers = {"error": str(error)[:300]}
                text = log.read_text()
                yield {"load": load, **shape, **busiest(text[before:]), **numbers, "memory": capacity(text)}
    except RuntimeError as error:
        yield {"error": str(error), **shape}


if __name__ == "__main__":
    main()
