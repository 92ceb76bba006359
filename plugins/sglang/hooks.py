"""How rdkv gets into SGLang: its flag and the name of its backend at load, everything else when that is chosen.

SGLang runs every installed plugin and only logs what a plugin raises. So what is installed here does nothing until a
server is started with ``--attention-backend rdkv``; then every hook is asserted to be in place.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from ...runtime.errors import ConfigError
from .options import parse
from .refusals import NAME, check_flags

logger = logging.getLogger("sglang.rdkv")

ARGS = "sglang.srt.server_args.ServerArgs"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler.__init__"
MOST_REQUESTS = 256  # at once, unless --max-running-requests says otherwise: each has a row in the arena's tables


def activate() -> None:
    """Add the backend's name and ``--rdkv-config`` to SGLang; the plugin's entry point."""
    from sglang.srt import server_args
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if NAME not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(_not_installed)
    HookRegistry.register(f"{ARGS}.add_cli_args", _add_flag, HookType.AFTER)
    HookRegistry.register(f"{ARGS}.from_cli_args", _from_flags, HookType.AROUND)
    HookRegistry.register(f"{ARGS}.__init__", _make_args, HookType.AROUND)
    HookRegistry.register(SCHEDULER, _install, HookType.BEFORE)


def chosen(server_args: Any) -> bool:
    """Whether a server is to serve compressed prompts."""
    return getattr(server_args, "attention_backend", None) == NAME


def hook(targets: dict[str, tuple[Callable[..., Any], str]]) -> None:
    """Put hooks in place, functions and the kinds of hook by target.

    Raises:
        ConfigError: SGLang has no such function, or did not take the hook.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, (function, kind) in targets.items():
        HookRegistry.register(target, function, HookType[kind])
    HookRegistry.apply_hooks()
    if missing := sorted(set(targets) - HookRegistry._patched):
        raise ConfigError(
            f"--attention-backend {NAME}: this SGLang has no {missing[0]} that takes a hook; install sglang 0.5.17"
        )


def _not_installed(runner: Any) -> NoReturn:
    raise ConfigError(
        f"--attention-backend {NAME}: the plugin was not installed in this process; does SGLANG_PLUGINS leave it out?"
    )


def _add_flag(result: Any, parser: Any) -> None:
    parser.add_argument(
        "--rdkv-config",
        type=str,
        default=None,
        help="With --attention-backend rdkv: JSON object of what compresses prompts, such as '{\"budget\": 0.05}'.",
    )


def _from_flags(original: Callable[..., Any], cls: Any, args: Any) -> Any:
    """Arguments from the command line, where a refusal is one line and exit code 2."""
    cls._rdkv_config = getattr(args, "rdkv_config", None)  # which the constructor takes over
    try:
        return original(cls, args)
    except ConfigError as error:
        print(f"rdkv: error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        del cls._rdkv_config


def _make_args(original: Callable[..., None], args: Any, *values: Any, **fields: Any) -> None:
    """Arguments with ``rdkv_config``, checked if it counts."""
    config = fields.pop("rdkv_config", getattr(type(args), "_rdkv_config", None))
    if fields.get("attention_backend") != NAME:
        if config is not None:
            raise ConfigError(f"--rdkv-config needs --attention-backend {NAME}")
        return original(args, *values, **fields)
    parse(config)
    if fields.get("max_running_requests") is None:
        fields["max_running_requests"] = MOST_REQUESTS
    fields["cuda_graph_backend_prefill"] = "disabled"  # the window is read between layers
    if fields.get("device") == "cpu":
        fields["cuda_graph_backend_decode"] = "disabled"
    original(args, *values, **fields)
    args._rdkv_config = config  # travels to the schedulers' processes with the arguments
    check_flags(args)
    return None


def _install(scheduler: Any, server_args: Any, *more: Any, **named: Any) -> None:
    """Before a scheduler is made: all other hooks, if its server serves compressed prompts."""
    if chosen(server_args):
        from .serving import Serving  # not above: it imports the pipeline

        Serving(server_args).install()
