"""rdkv in lm-evaluation-harness: scores and answers are those of each context's own compressed cache.

Needs ``pip install rdkv[lm-eval]``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import rdkv
from rdkv.runtime.errors import ConfigError, UnsupportedModelError

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install rdkv[lm-eval])")

BUDGET = 0.4
TEXTS = ["The quick brown fox jumps over the lazy dog. " * n + "It is" for n in (3, 4, 2, 5)]
PAIRS = [(text, end) for text in TEXTS for end in (" a", " the fox, isn't it?", " not so")]


@pytest.fixture
def make(tiny_folder: Path) -> Callable[..., Any]:
    """A function from arguments to the model under test; 'hf' is lm-evaluation-harness's own."""
    from lm_eval.api.registry import get_model

    from rdkv.plugins.lm_eval.model import RdkvLM

    def model(name: str = "rdkv", **arguments: Any) -> Any:
        assert get_model("rdkv") is RdkvLM
        text = ",".join(f"{key}={value}" for key, value in {"pretrained": tiny_folder, **arguments}.items())
        made = get_model(name).create_from_arg_string(text, {"device": "cpu"})
        made.model.generation_config.eos_token_id = None  # random models should run to the last token
        return made

    return model


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


@torch.no_grad()
def by_hand(
    model: Any, config: rdkv.CompressionConfig, context: list[int], continuation: list[int], after: int = 0
) -> Any:
    """One context in a cache of its own, then its last tokens and the continuation token by token."""
    cache = rdkv.CompressedCache(model.config, config)
    end = len(context) - after
    logits = model(torch.tensor([context[:end]]), past_key_values=cache).logits[0, -1]
    for token in context[end:]:
        logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    total, greedy = 0.0, True
    for token in continuation:
        total += float(logits.log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
        logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    return total, greedy


@pytest.mark.parametrize("after", [0, 1, 7])
def test_log_likelihoods_are_those_of_each_context_alone(after: int, make: Callable[..., Any]) -> None:
    for size in (1, 3):
        held = make(budget=BUDGET, batch_size=size, calibration="none", question_tokens=after)
        found = held.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
        for (context, end), (score, greedy) in zip(PAIRS, found, strict=True):
            tokens = held._encode_pair(context, end)
            expected, is_greedy = by_hand(held.model, held.compression, *tokens, after)
            assert score == pytest.approx(expected, abs=1e-3)
            assert greedy == is_greedy


def test_the_whole_budget_is_the_harness_own_model(make: Callable[..., Any]) -> None:
    ask = requests("loglikelihood", PAIRS)
    whole = make(budget=1.0, batch_size=3).loglikelihood(ask, disable_tqdm=True)
    own = make("hf", batch_size=3).loglikelihood(ask, disable_tqdm=True)
    tight = make(budget=0.2, batch_size=3).loglikelihood(ask, disable_tqdm=True)
    for (score, greedy), (expected, is_greedy) in zip(whole, own, strict=True):
        assert score == pytest.approx(expected, rel=2e-3)  # a float32 model's cache has 16 bits
        assert greedy == is_greedy
    assert max(abs(a[0] - b[0]) for a, b in zip(tight, own, strict=True)) > 0.5


def test_greedy_is_true_of_what_greedy_decoding_gives(make: Callable[..., Any]) -> None:
    held = make(budget=BUDGET, batch_size=3)
    asked = []
    for text in TEXTS:
        ids = held.tokenizer(text, return_tensors="pt").input_ids
        cache = rdkv.CompressedCache(held.model.config, held.compression)
        answer = held.model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=0)
        tokens = answer[0, ids.shape[1] :].tolist()
        asked += [(None, ids[0].tolist(), tokens), (None, ids[0].tolist(), [*tokens[:3], (tokens[3] + 1) % 259])]
    found = held._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False] * len(TEXTS)


@pytest.mark.parametrize(("size", "after"), [(1, 0), (3, 0), (3, 5)])
def test_answers_are_those_of_each_context_alone(size: int, after: int, make: Callable[..., Any]) -> None:
    held = make(budget=BUDGET, batch_size=size, question_tokens=after)
    until = {"until": ["\n\n"], "max_gen_toks": 8}
    answers = held.generate_until(requests("generate_until", [(text, until) for text in TEXTS]), disable_tqdm=True)
    for text, answer in zip(TEXTS, answers, strict=True):
        ids = held.tokenizer(text, return_tensors="pt").input_ids
        cache = rdkv.CompressedCache(held.model.config, held.compression)
        if after:
            with torch.no_grad():
                held.model(ids[:, :-after], past_key_values=cache)
        tokens = held.model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert answer == held.tok_decode(tokens[0, ids.shape[1] :]).split("\n\n")[0]
    info = held.get_model_info()
    assert 0.8 * BUDGET < info["rdkv_retention"] <= BUDGET
    assert info["rdkv_scorer"] == "attention-distortion"


def test_settings_come_from_arguments_over_a_file(make: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('budget = 0.5\nscorer = "snapkv"\nscorer-option = { kernel_size = 3 }\nallocator = "eviction"\n')
    made = make(config=file, budget=0.3, calibration="none", attention_backend="torch").compression
    assert made == rdkv.CompressionConfig(
        budget=0.3, scorer="snapkv", scorer_options={"kernel_size": 3}, allocator="eviction",
        calibration="none", backend="torch",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no budget"),
        ({"budget": 0.3, "scorer": "snapkw"}, "did you mean 'snapkv'"),
        ({"budget": 0.3, "budget_tokens": 40}, "both"),
        ({"budget": "a lot"}, "budget"),
        ({"budget": 0.3, "question_tokens": -1}, "question_tokens"),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, Any], message: str, make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**arguments)


def test_choices_of_one_token_see_the_compression_only_after_the_question(make: Callable[..., Any]) -> None:
    ask = requests("loglikelihood", [(text, end) for text in TEXTS for end in "!?"])
    own = make("hf").loglikelihood(ask, disable_tqdm=True)
    for after, differs in ((0, False), (1, True)):
        found = make(budget=0.1, question_tokens=after).loglikelihood(ask, disable_tqdm=True)
        assert (max(abs(a[0] - b[0]) for a, b in zip(found, own, strict=True)) > 1e-2) == differs


def test_what_has_no_context_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="--model hf"):
        make(budget=0.3).loglikelihood_rolling(requests("loglikelihood_rolling", [("a text",)]))


def test_beams_are_refused(make: Callable[..., Any]) -> None:
    until = {"until": [], "max_gen_toks": 3, "num_beams": 2}
    with pytest.raises((UnsupportedModelError, ValueError), match="beam"):
        make(budget=0.3).generate_until(requests("generate_until", [(TEXTS[0], until)]), disable_tqdm=True)


def test_the_entry_point_names_the_model() -> None:
    from rdkv.plugins.lm_eval.model import RdkvLM

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["rdkv"].partition(":")
    assert getattr(import_module(module), name) is RdkvLM


TASKS = {
    "tiny_choice": """output_type: multiple_choice
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}]""",
    "tiny_answer": """output_type: generate_until
doc_to_target: answer
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]""",
}


def test_the_command_line_on_local_tasks(tiny_folder: Path, tmp_path: Path) -> None:
    """A process of its own, as a user starts it, on tasks that are nothing but files."""
    rows = [
        {"context": text, "choices": [" a", " not so"], "label": i % 2, "answer": "!"} for i, text in enumerate(TEXTS)
    ]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    for task, what in TASKS.items():
        files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.json'}}}}}\n"
        (tmp_path / f"{task}.yaml").write_text(
            f'task: {task}\n{files}test_split: test\ndoc_to_text: "{{{{context}}}}"\n{what}\n'
        )
    command = [sys.executable, "-m", "rdkv.plugins.lm_eval", "run", "--model", "rdkv", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tiny_folder},scorer=snapkv,budget={BUDGET}", "--batch_size", "2"]
    command += ["--include_path", str(tmp_path), "--tasks", ",".join(TASKS), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["rdkv_scorer"] == "snapkv"
    assert 0.8 * BUDGET < results["config"]["rdkv_retention"] <= BUDGET
    assert {task: counts["effective"] for task, counts in results["n-samples"].items()} == dict.fromkeys(TASKS, 4)
    assert 0 <= results["results"]["tiny_choice"]["acc,none"] <= 1

    command[command.index("--model_args") + 1] = f"pretrained={tiny_folder},scorer=snapkv"
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("rdkv: error: no budget")
