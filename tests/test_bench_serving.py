"""What the serving bench makes of a server's log and of its records; SGLang is not needed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.speed.serving import LOAD, busiest, capacity, make_model, servers
from bench.speed.serving_table import serving

LOG = """
[10:00] rdkv: arena of 33.44 GB for 5101973 tokens of prompts (36 prompts of 140000 tokens at once), beside 656369
[10:00] max_total_num_tokens=656369, chunked_prefill_size=8192
[10:01] Decode batch, #running-req: 2, #token: 9, token usage: 0.00, cuda graph: True, gen throughput (token/s): 9.50,
[10:01] Prefill batch, #new-seq: 1, #running-req: 9, #queue-req: 0, input throughput (token/s): 5.00
[10:02] Decode batch, #running-req: 7, #token: 9, token usage: 0.00, cuda graph: True, gen throughput (token/s): 20.00,
[10:03] Decode batch, #running-req: 7, #token: 9, token usage: 0.00, cuda graph: True, gen throughput (token/s): 40.00,
"""


def test_busiest() -> None:
    assert busiest(LOG) == {"most_running": 7, "decode_throughput": 30.0}
    assert busiest("nothing") == {"most_running": 0}
    assert capacity(LOG).startswith("rdkv: arena of 33.44 GB")
    assert "max_total_num_tokens=656369" in capacity(LOG)


def test_servers_differ_in_their_cache_alone() -> None:
    arguments = argparse.Namespace(
        server=["sglang-16bit", "sglang-fp8", "rdkv"], stock="flashinfer", budget=0.05, arena=0.3
    )
    flags = servers(arguments)
    assert flags["sglang-fp8"] == [*flags["sglang-16bit"], "--kv-cache-dtype", "fp8_e4m3"]
    assert '"prefill": "flashinfer"' in flags["rdkv"][-1]  # prompts are read as stock servers read them


@pytest.mark.parametrize("load", ["131072x128x24@2", "32768x4096x64@inf", "1x1x1@0.25"])
def test_loads(load: str) -> None:
    assert LOAD.fullmatch(load)
    assert not LOAD.fullmatch(f"{load}x")


def test_table() -> None:
    record = {
        "kind": "serving", "layers": 32, "load": "32768x4096x64@inf", "device": "some GPU", "most_running": 24,
        "decode_throughput": 838.4, "torch": "2",
    }  # fmt: skip
    ours = record | {"server": "rdkv", "budget": 0.05, "output_throughput": 1470.9, "median_itl_ms": 20.66}
    rows = serving([ours, record | {"server": "sglang-16bit", "budget": None}]).splitlines()
    assert rows[0] == "some GPU, torch 2."
    assert "| 32,768 | 4,096 | 64 | all at once | SGLang, 16 bits | 24 | not measured | 838 |" in rows[4]
    assert "| rdkv, 5% | 24 | 1,471 | 838 | not measured | 20.7 | not measured |" in rows[5]


def test_model_has_a_word_for_every_token(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    make_model(tmp_path, layers=2)
    config, words = AutoConfig.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (2, 8, 128)
    assert words("t5 t7", add_special_tokens=False).input_ids == [5, 7]
    assert len(words) == config.vocab_size
