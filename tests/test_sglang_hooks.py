"""The plugin in SGLang: without its backend nothing changes, with it everything is checked before the model loads."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from rdkv.plugins.sglang import hooks
from rdkv.plugins.sglang.refusals import REFUSED
from rdkv.runtime.errors import ConfigError

if find_spec("sglang") is None:
    pytest.skip("SGLang is not installed; make test-sglang installs it", allow_module_level=True)
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs, prepare_server_args

CONFIG = '{"budget": 0.05}'


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """SGLang finds the plugin by its entry point."""
    load_plugins()


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    """Arguments of a server on the CPU, without a backend."""
    config = LlamaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=16)
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    return {"model_path": str(tmp_path), "device": "cpu", "skip_tokenizer_init": True, "disable_radix_cache": True}


def flags(fields: dict[str, Any], *more: str) -> list[str]:
    return ["--model-path", fields["model_path"], "--device", "cpu", "--skip-tokenizer-init", *more]


def test_every_refused_field_is_one_of_sglangs() -> None:
    missing = [field for field, *_ in REFUSED if field not in ServerArgs.__dataclass_fields__]
    assert missing == []


def test_without_the_backend_nothing_changes(fields: dict[str, Any]) -> None:
    """Arguments come out as without the plugin, and no function that runs a model is another one."""
    fields["attention_backend"] = "torch_native"
    args, plain = ServerArgs(**fields), ServerArgs.__new__(ServerArgs)
    ServerArgs.__init__.__wrapped__(plain, **fields)
    ours, theirs = (
        {name: getattr(a, name) for name in ServerArgs.__dataclass_fields__ if name != "random_seed"}
        for a in (args, plain)
    )
    assert str(ours) == str(theirs)
    from sglang.srt.managers import schedule_policy, tp_worker
    from sglang.srt.mem_cache import memory_pool

    for function in (
        schedule_policy.PrefillAdder.add_one_req,
        tp_worker.TpModelWorker.forward_batch_generation,
        memory_pool.ReqToTokenPool.free,
    ):
        assert not hasattr(function, "__wrapped__") or function.__wrapped__.__module__ != hooks.__name__


def test_with_it(fields: dict[str, Any]) -> None:
    args = ServerArgs(**fields, attention_backend="rdkv", rdkv_config=CONFIG)
    assert (args.attention_backend, args._rdkv_config, args.max_running_requests) == ("rdkv", CONFIG, 256)
    assert args.cuda_graph_config.prefill.backend == "disabled"


def test_from_the_command_line(fields: dict[str, Any]) -> None:
    command = flags(fields, "--disable-radix-cache", "--attention-backend", "rdkv", "--rdkv-config", CONFIG)
    args = prepare_server_args([*command, "--max-running-requests", "9"])
    assert (args._rdkv_config, args.max_running_requests) == (CONFIG, 9)
    assert not hasattr(ServerArgs, "_rdkv_config")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--attention-backend", "rdkv"], "--attention-backend rdkv needs --rdkv-config"),
        (["--attention-backend", "rdkv", "--rdkv-config", "{}"], "no budget"),
        (["--rdkv-config", CONFIG, "--attention-backend", "torch_native"], "--rdkv-config needs --attention-backend"),
        (["--attention-backend", "rdkv", "--rdkv-config", CONFIG], "the radix cache (set --disable-radix-cache)"),
        (
            ["--attention-backend", "rdkv", "--rdkv-config", CONFIG, "--disable-radix-cache", "--enable-mixed-chunk"],
            "--enable-mixed-chunk does not work with --attention-backend rdkv",
        ),
        (
            ["--attention-backend", "rdkv", "--rdkv-config", CONFIG, "--disable-radix-cache", "--page-size", "16"],
            "--page-size above 1",
        ),
    ],
)
def test_refused_in_one_line(
    fields: dict[str, Any], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        prepare_server_args(flags(fields, *more))
    assert caught.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("rdkv: error: ")
    assert message in line


def test_refused_from_python(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--page-size above 1"):
        ServerArgs(**fields, page_size=16, attention_backend="rdkv", rdkv_config=CONFIG)


def test_a_hook_that_finds_no_target_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(HookRegistry, "_hooks", {k: list(v) for k, v in HookRegistry._hooks.items()})
    target = "sglang.srt.server_args.ServerArgs.not_there"
    HookRegistry._hooks.setdefault(target, [])
    with pytest.raises(ConfigError, match=f"has no {target} that takes a hook; install sglang 0.5.17"):
        hooks.hook({target: (print, "AFTER")})


def test_in_a_process_without_the_plugin() -> None:
    with pytest.raises(ConfigError, match="does SGLANG_PLUGINS leave it out"):
        hooks._not_installed(None)


def test_no_plugin_imports_sglang_by_itself() -> None:
    """`rdkv.plugins.sglang` is imported by SGLang's plugin loader, also where another backend is chosen."""
    assert "rdkv.plugins.sglang.serving" not in sys.modules
