"""``rdkv serve``: SGLang with compressed prompts, its flags set."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import click
import msgspec

from .cli_options import BACKEND, COMPRESSION_OPTIONS, DEBUG, PLUGIN, note_debug, with_options

if TYPE_CHECKING:
    from .config import CompressionConfig

RELEASE = "0.5.17"  # of SGLang; the plugin hooks functions that other releases rename
OWN_FLAGS = ("--model-path", "--model", "--attention-backend", "--rdkv-config")
SERVING_OPTIONS = [
    click.option("--arena", type=float, metavar="X", help="Share of the cache memory for compressed prompts.  [0.5]"),
    click.option("--min-tokens", type=int, metavar="N", help="Shorter prompts stay as they are.  [default: 256]"),
    click.option("--prefill", metavar="NAME", help="SGLang's attention backend for prompts.  [default: triton]"),
]
SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": True}


@click.command(name="serve", context_settings=SETTINGS)
@click.argument("model", metavar="M")
@with_options([*COMPRESSION_OPTIONS, *SERVING_OPTIONS, BACKEND, PLUGIN, DEBUG])
@click.argument("sglang_flags", nargs=-1, type=click.UNPROCESSED, metavar="[SGLANG FLAGS]")
def command(
    model: str,
    sglang_flags: Sequence[str],
    arena: float | None,
    min_tokens: int | None,
    prefill: str | None,
    **flags: Any,
) -> None:
    """Serve model M with SGLang, each prompt's cache compressed once it is read.

    All other flags are SGLang's, such as --port 30000 or --tp 2; M comes first.
    """
    from .settings import compression_config, read_settings

    settings = read_settings(flags, None)
    note_debug(settings.debug)
    serving = {"arena": arena, "min_tokens": min_tokens, "prefill": prefill}
    text = serving_json(compression_config(settings), serving)
    arguments = launch_arguments(model, text, sglang_flags)
    check_release()
    os.execv(sys.executable, arguments)


def serving_json(compression: CompressionConfig, serving: dict[str, Any]) -> str:
    """What ``--rdkv-config`` takes: what differs from the defaults."""
    from .settings import BUDGETS

    default = type(compression)(budget=1.0)
    fields = {
        name: value
        for name, value in msgspec.to_builtins(compression).items()
        if name in BUDGETS or value != msgspec.to_builtins(default)[name]
    }
    given = {name: value for name, value in (fields | serving).items() if value is not None}
    return msgspec.json.encode(given).decode()


def launch_arguments(model: str, config: str, flags: Sequence[str]) -> list[str]:
    """The command that starts SGLang.

    Raises:
        ConfigError: flags that are ours to set.
    """
    from .errors import ConfigError

    if taken := [flag for flag in flags if flag.split("=")[0] in OWN_FLAGS]:
        raise ConfigError(f"rdkv serve sets {taken[0].split('=')[0]} itself; leave it out")
    own = ["--model-path", model, "--attention-backend", "rdkv", "--rdkv-config", config]
    if "--disable-radix-cache" not in flags:
        own.append("--disable-radix-cache")
    return [sys.executable, "-m", "sglang.launch_server", *own, *flags]


def check_release() -> None:
    """Ask for the release of SGLang that the plugin works with.

    Raises:
        ConfigError: there is none, or another one.
    """
    from .errors import ConfigError

    try:
        found = version("sglang")
    except PackageNotFoundError:
        raise ConfigError('SGLang is not installed: pip install "rdkv[sglang]"') from None
    if found.partition(".post")[0] != RELEASE:
        raise ConfigError(f"SGLang {found} is installed, and rdkv serve needs {RELEASE}: pip install sglang=={RELEASE}")
