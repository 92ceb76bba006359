"""Real SGLang with compressed prompts: the tokens of stock SGLang, or of our own cache, and nothing lost.

On a CPU in float32, and to the token. On a GPU in bfloat16, where other kernels round otherwise, see `assert_alike`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibrations import written
from sglang_cases import ON_GPU, Case, Reports
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import rdkv
from rdkv.kernels.arena_shape import EVEN, ArenaShape
from rdkv.runtime.pipeline import Pipeline

if find_spec("sglang") is None:
    pytest.skip("SGLang is not installed; make test-sglang installs it", allow_module_level=True)
PROMPTS = [
    [5, 6, 7, 8] * 5,
    [9, 10, 11],
    list(range(3, 103)),
    [17] * 70 + [33, 5] * 15,
    list(range(100, 3, -1)),
    [4, 7] * 33,
]
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}
MANY = 50
# Of stock engines, too; larger batches than those that graphs are captured for run without a graph.
BOTH: dict[str, Any] = {"max_total_tokens": 4096} | ({"cuda_graph_max_bs_decode": 16} if ON_GPU else {})


def rdkv_engine(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    text = json.dumps({"min_tokens": 1, "arena_bytes": 50_000_000, **config})
    return {"attention_backend": "rdkv", "rdkv_config": text, "log_level": "debug", **BOTH, **more}


def many() -> tuple[list[list[int]], list[int], dict[int, list[int]]]:
    """Prompts, new tokens, and which requests are aborted after which was sent."""
    draw = random.Random(1)
    prompts = [[draw.randrange(3, 128) for _ in range(draw.randrange(1, 160))] for _ in range(MANY)]
    new = [draw.randrange(1, 40) for _ in range(MANY)]
    aborted = draw.sample(range(MANY), 12)
    later: dict[int, list[int]] = {}
    for i in aborted:
        later.setdefault(min(i + draw.randrange(10), MANY - 1), []).append(i)
    return prompts, new, later


def compressions(calibration: Path) -> dict[str, dict[str, Any]]:
    """Configurations whose tokens are compared with those of our own cache, by case."""
    return {"compressed": {"budget": 0.4}, "uneven": {"budget": 0.5, "calibration": str(calibration)}}


def cases(calibration: Path) -> dict[str, Case]:
    new = [24] * len(PROMPTS)
    identity = {"budget": 1.0}
    prompts, lengths, abort = many()
    stock = {"attention_backend": "triton" if ON_GPU else "torch_native", **BOTH}
    retracting = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "3", **STRICT}
    chunks = {"chunked_prefill_size": 64}
    by_head = {"budget": 0.4, "allocator_options": {"scope": "head"}, "calibration": str(calibration)}
    ranks = {"SGLANG_CPU_OMP_THREADS_BIND": "0|0", "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}  # others use GPU 0
    # Room for a few prompts of the average length, beside the tables: the others wait.
    small, spread = {"budget": 1.0, "arena_bytes": 600_000}, 0.002 if ON_GPU else 0.05
    # While one of these is read, the pool has no room for another: all are held at once by slots that come back.
    long = [[3 + (i * j) % 120 for j in range(300)] for i in (7, 11, 13, 17)]
    narrow = {"max_total_tokens": 640, "decode_log_interval": 1, **chunks}
    made = {
        "stock": Case(PROMPTS, new, stock),
        "overlap": Case(PROMPTS, new, rdkv_engine({**identity, "arena_bytes": None}), STRICT),  # the default share
        "chunks": Case(PROMPTS, new, rdkv_engine(identity, **chunks, disable_overlap_schedule=True), STRICT),
        "retraction": Case(PROMPTS, new, rdkv_engine(identity, **chunks), retracting),
        **{k: Case(PROMPTS, new, rdkv_engine(v, **chunks), STRICT) for k, v in compressions(calibration).items()},
        "one-rank": Case(PROMPTS, new, rdkv_engine(by_head)),
        "two-ranks": Case(PROMPTS, new, rdkv_engine(by_head, tp_size=2), ranks),
        "narrow": Case(long, [60] * len(long), rdkv_engine({"budget": 0.4}, **narrow), STRICT),
        "stock-many": Case(prompts, lengths, {**stock, **chunks}),
        "many": Case(prompts, lengths, rdkv_engine(small, **chunks), spread=spread, abort=abort),
    }
    if ON_GPU and torch.cuda.device_count() < 2:
        del made["two-ranks"]
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights large enough that its greedy tokens are no ties."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of unlike weight, and more bytes for the second layer than its full cache has, at half of all."""
    path = tmp_path_factory.mktemp("calibration") / "layers.json"
    return Path(written(path, heads=((0.004, 0.006), (0.3, 0.7), (0.04, 0.01))))


@pytest.fixture(scope="module")
def reports(model: Path, calibration: Path) -> Iterator[Reports]:
    reports = Reports(cases(calibration), model)
    yield reports
    reports.close()


def tokens(report: dict[str, Any]) -> list[list[int]]:
    return [answer["tokens"] for answer in report["answers"]]


def assert_alike(mine: list[list[int]], theirs: list[list[int]]) -> None:
    """The same tokens; on a GPU most: what follows a token that two kernels choose differently is free."""
    if not ON_GPU:
        assert mine == theirs
        return
    same = 0
    for ours, others in zip(mine, theirs, strict=True):
        differ = [i for i, pair in enumerate(zip(ours, others, strict=True)) if len(set(pair)) > 1]
        same += differ[0] if differ else len(ours)
    assert same >= 0.8 * sum(map(len, theirs))


@pytest.mark.parametrize("name", ["overlap", "chunks", "retraction"])
def test_identity_gives_the_same_tokens(reports: Reports, name: str) -> None:
    assert_alike(tokens(reports[name]), tokens(reports["stock"]))
    assert_alike([reports[name]["again"]], tokens(reports["stock"])[:1])
    if name == "retraction":
        assert sum(answer["retractions"] for answer in reports[name]["answers"]) > 0


@pytest.mark.parametrize("name", ["compressed", "uneven"])
def test_compressed_as_the_cache(reports: Reports, model: Path, calibration: Path, name: str) -> None:
    """The plan of each prompt is that of `rdkv.CompressedCache`, window and all, though it was read in chunks."""
    device, dtype = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
    reference = rdkv.attach(AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device))
    reference.generation_config.eos_token_id = None
    config, expected = rdkv.CompressionConfig(**compressions(calibration)[name]), []
    for prompt in PROMPTS:
        cache = rdkv.CompressedCache(reference.config, config)
        ids = torch.tensor([prompt], device=device)
        output = reference.generate(ids, past_key_values=cache, max_new_tokens=24, do_sample=False, pad_token_id=0)
        expected.append(output[0, len(prompt) :].tolist())
        if len(prompt) > 20:
            assert f"{len(prompt)} tokens packed to" in reports[name]["log"]
    assert_alike(tokens(reports[name]), expected)
    assert tokens(reports[name]) != tokens(reports["stock"])


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs, or none")
def test_two_ranks_give_the_tokens_of_one(reports: Reports) -> None:
    """Where heads do not compete: a rank sees its own alone, and the same budgets of layers."""
    assert_alike(tokens(reports["two-ranks"]), tokens(reports["one-rank"]))


def test_requests_come_and_go(reports: Reports) -> None:
    """Some wait for the arena, some are aborted; the others answer as stock SGLang does."""
    ended, expected = 0, []
    for answer, stock in zip(reports["many"]["answers"], reports["stock-many"]["answers"], strict=True):
        expected.append(stock["tokens"][: len(answer["tokens"])])
        if answer["finish"] != "abort":
            ended += 1
            assert len(answer["tokens"]) == len(stock["tokens"])
    assert_alike(tokens(reports["many"]), expected)
    assert MANY - 12 <= ended < MANY
    assert reports["many"]["state"]["admissions_put_off"] > 0


def test_slots_that_come_back_are_waited_for() -> None:
    """SGLang takes "no token" to last until a request ends, which slots of a prompt that is packed do not need."""
    from sglang.srt.managers.schedule_policy import AddReqResult as Result

    from rdkv.plugins.sglang.ledger import Ledger  # not above: hooks are tested without it
    from rdkv.plugins.sglang.serving import Packed, Serving

    serving = Serving(SimpleNamespace(_rdkv_config='{"budget": 0.5}'))
    serving.pipeline = Pipeline(LlamaConfig(num_hidden_layers=1), serving.compression)
    serving.shape = ArenaShape((EVEN,), 1, 16, 16, torch.bfloat16, 1, 0)
    request = SimpleNamespace(rid="a", full_untruncated_fill_ids=[1])
    adder = SimpleNamespace(running_batch=None, can_run_list=[], req_states=None)
    assert serving.admit(lambda *_: Result.NO_TOKEN, adder, request) == Result.NO_TOKEN
    adder.can_run_list.append(SimpleNamespace(rid="stays in the pool", origin_input_ids=[1]))
    assert serving.admit(lambda *_: Result.NO_TOKEN, adder, request) == Result.NO_TOKEN
    serving.ledger = Ledger(1)
    assert serving.ledger.reserve("is being read", 1)
    adder.can_run_list.append(SimpleNamespace(rid="is being read", origin_input_ids=[1]))
    assert serving.admit(lambda *_: Result.NO_TOKEN, adder, request) == Result.OTHER
    adder.can_run_list.clear()
    serving._packed.append(Packed(request, 1, 1))
    assert serving.admit(lambda *_: Result.NO_TOKEN, adder, request) == Result.OTHER
    assert serving.admit(lambda *_: Result.CONTINUE, adder, request) == Result.CONTINUE


def test_a_pool_that_holds_one_prompt_serves_many_at_once(reports: Reports) -> None:
    found = re.findall(r"Decode batch, #running-req: (\d+)", reports["narrow"]["log"])
    assert max(map(int, found)) == len(reports["narrow"]["answers"]) == 4
    assert all(answer["retractions"] == 0 for answer in reports["narrow"]["answers"])


@pytest.mark.parametrize("name", ["overlap", "chunks", "retraction", "compressed", "uneven", "narrow", "many"])
def test_nothing_is_left(reports: Reports, name: str) -> None:
    state = reports[name]["state"]
    assert state["arena_bytes"] > 0
    assert (state["arena_used_bytes"], state["compressed_sequences"], state["prompts_being_read"]) == (0, 0, 0)


def test_says_how_large_the_arena_is(reports: Reports) -> None:
    assert "rdkv: arena of" in reports["overlap"]["log"]
    assert "rdkv" not in reports["stock"]["log"].replace("rdkv_config", "").split("Applied")[0]
    assert reports["stock"]["state"] is None
