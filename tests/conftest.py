"""Shared fixtures: tiny random models of each family, a byte tokenizer, and a home of the test's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

# Without a GPU kernels run in Triton's interpreter; it has to know before transformers imports it.
os.environ["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from rdkv.kernels import backends
from rdkv.plugins.rdkv.format import MixedBit
from rdkv.runtime import cli
from rdkv.runtime.home import home

# Every worker of pytest-xdist is a process of its own: one thread each, or they fight for the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# A name that is not a folder must fail at once, without asking a hub: here and in processes started from here.
huggingface_hub.constants.HF_HUB_OFFLINE = True
os.environ["HF_HUB_OFFLINE"] = "1"
transformers_logging.disable_progress_bar()

# Where converted models of the real home are: converting one takes half a minute, which is paid once.
REAL_HOME = home()

FAMILIES: dict[str, tuple[type[Any], type[Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
}
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
VOCABULARY = len(SPECIAL_TOKENS) + 256

TinyModel = Callable[..., Any]
Arguments = Callable[..., list[str]]
ErrorLine = Callable[..., str]
TEXT = "The quick brown fox jumps over the lazy dog. " * 4


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The format packs when a layer is finished, as on a GPU; plain PyTorch packs at once."""
    at_once = MixedBit.begin
    monkeypatch.setattr(MixedBit, "begin", lambda *arguments: lambda: at_once(*arguments)())


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel does not write is NaN."""
    empty: Callable[..., torch.Tensor] = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def fresh_backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No backend failed and nothing was said of one so far in this process."""
    monkeypatch.setattr(backends, "_failures", {})
    backends.say.cache_clear()
    yield
    backends.say.cache_clear()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws its own random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def rdkv_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, so that no test reads what another, or the user, calibrated."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("RDKV_HOME", str(home))
    monkeypatch.delenv("RDKV_PLUGINS", raising=False)
    return home


@pytest.fixture
def real_home(rdkv_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own home, for tests with a real model; they must not calibrate."""
    monkeypatch.setenv("RDKV_HOME", str(REAL_HOME))
    return REAL_HOME


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    """A function from a family's name to a random model of it: 2 layers, 4 query and 2 KV heads, D = 16."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
        config_class, model_class = FAMILIES[family]
        settings: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if family == "qwen3":
            settings["head_dim"] = 16
        if family == "mistral":
            settings["sliding_window"] = None
        torch.manual_seed(seed)
        model = model_class(config_class(**(settings | changes))).eval().to(dtype)
        with torch.no_grad():  # attention of an untrained model is flat; larger projections make it peak
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2 and "embed" not in name:
                    parameter.mul_(4.0)
        model.generation_config.eos_token_id = None  # random models should run to the last token
        return model

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte after three special ones, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_folder(
    tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a tiny Llama and its tokenizer, as ``save_pretrained`` writes it."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def own_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in this process must leave the libraries' warnings, and pytest's streams, to other tests."""
    monkeypatch.setattr(cli, "silence_libraries", lambda: None)
    logging.getLogger("rdkv").handlers.clear()


@pytest.fixture
def arguments(tiny_folder: Path) -> Arguments:
    """``generate`` with a tiny model, a prompt and a budget, and whatever a test adds."""

    def make(*more: str, command: str = "generate", prompt: str = TEXT, budget: str | None = "0.3") -> list[str]:
        base = [command, "--model", str(tiny_folder), "--prompt", prompt, "--max-new-tokens", "4", "--device", "cpu"]
        return [*base, *([] if budget is None else ["--budget", budget]), *more]

    return make


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture[str], own_streams: None) -> ErrorLine:
    """A function that runs a command which has to fail, and returns the one line that it prints."""

    def check(arguments: list[str], code: int = 2) -> str:
        assert cli.run(arguments) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        lines = captured.err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("rdkv: error: ")
        return lines[0]

    return check
