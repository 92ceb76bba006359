"""What SGLang may expect of running requests when some of their prompts are packed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from rdkv.plugins.sglang.admission import coming
from rdkv.plugins.sglang.ledger import Ledger


def request(name: str, prompt: int, made: int, new: int, ignore_eos: bool = True) -> Any:
    parameters = SimpleNamespace(ignore_eos=ignore_eos, max_new_tokens=new)
    return SimpleNamespace(rid=name, origin_input_ids=[0] * prompt, output_ids=[0] * made, sampling_params=parameters)


def test_a_packed_prompt_frees_its_new_tokens_alone() -> None:
    ledger = Ledger(10)
    ledger.reserve("packed", 5)
    running = [request("packed", 1000, 10, 50), request("plain", 1000, 10, 30), request("over", 9, 7, 7)]
    read = [request("early", 20, 0, 100, ignore_eos=False)]
    adder = SimpleNamespace(running_batch=SimpleNamespace(reqs=running), can_run_list=read, new_token_ratio=0.5)
    assert coming(adder, ledger) == [(20, 1010), (40, 10), (50, 20)]
    adder.running_batch = None
    assert coming(adder, ledger) == [(50, 20)]
