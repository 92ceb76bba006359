"""What SGLang may expect of running requests when some of their prompts are packed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rdkv.kernels.arena import ArenaShape
from rdkv.plugins.sglang.admission import coming
from rdkv.plugins.sglang.ledger import Ledger
from rdkv.plugins.sglang.serving import Packed, Serving


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


def test_slots_that_come_back_are_waited_for() -> None:
    """SGLang takes "no token" to last until a request ends, which slots of a packed prompt do not need."""
    policy = pytest.importorskip("sglang.srt.managers.schedule_policy").AddReqResult
    serving, adder = (
        Serving(SimpleNamespace(_rdkv_config='{"budget": 0.5}')),
        SimpleNamespace(running_batch=None, can_run_list=[], req_states=None),
    )
    serving.shape, asked = ArenaShape(1, 1, 16, torch.bfloat16, 1, 0), SimpleNamespace(rid="a", origin_input_ids=[1])
    asked.full_untruncated_fill_ids = asked.origin_input_ids
    assert serving.admit(lambda *_: policy.NO_TOKEN, adder, asked) == policy.NO_TOKEN
    serving._packed.append(Packed(asked, 1, 1))
    assert serving.admit(lambda *_: policy.NO_TOKEN, adder, asked) == policy.OTHER
    assert serving.admit(lambda *_: policy.CONTINUE, adder, asked) == policy.CONTINUE
