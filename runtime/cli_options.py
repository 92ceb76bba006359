"""Flags that commands share, and ``key=value`` pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args

import click

from .config import BudgetBy

Command = TypeVar("Command", bound=Callable[..., Any])


def pairs(ctx: click.Context, parameter: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    """A mapping from ``k=v`` texts."""
    options: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise click.BadParameter(f"{text!r} is not of the form name=value")
        options[key.strip()] = value.strip()
    return options


def note_debug(debug: bool) -> None:
    """Let a ``debug`` that comes from ``--config`` bring tracebacks too, as the flag does."""
    if debug:
        click.get_current_context().find_root().obj["debug"] = True


def switch(name: str, text: str) -> Callable[[Command], Command]:
    """``--name/--no-name``, None where neither is given, so that a file's value stands."""
    return click.option(f"--{name}/--no-{name}", default=None, help=text)


PLUGIN = click.option("-p", "--plugin", "plugins", multiple=True, metavar="MODULE",
                      help="Load this plugin too: a module's name or a .py file. Repeatable.")  # fmt: skip
DEBUG = click.option("--debug", is_flag=True, default=None, help="Show tracebacks, warnings and progress bars.")
MODEL = click.option("--model", metavar="M", help="Folder, GGUF file, Hugging Face id, or smollm2-135m.")
DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to run.  [default: auto]")
DTYPE = click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
                     help="Precision of the model.  [default: float32 on a CPU, the checkpoint's on CUDA]")  # fmt: skip


BACKENDS = ["auto", "torch", "triton", "flashinfer"]
BACKEND = click.option("--backend", type=click.Choice(BACKENDS),
                       help="What computes decode attention; `rdkv plugins` lists them.  [default: auto]")  # fmt: skip


def _pluggable(kind: str) -> list[Callable[[Command], Command]]:
    return [
        click.option(f"--{kind}", metavar="NAME", help=f"Which {kind}; `rdkv plugins` lists them."),
        click.option(f"--{kind}-option", f"{kind}_options", multiple=True, callback=pairs, metavar="K=V",
                     help=f"An option of the {kind}. Repeatable."),
    ]  # fmt: skip


CONFIG = click.option("--config", metavar="FILE", help="TOML file with any of these flags; flags given here win.")
JSON = switch("json", "Print one JSON object.")
CHAT = switch("chat", "Use the model's chat template.")

PROMPT_OPTIONS = [
    click.option("--prompt", metavar="TEXT", help="The prompt."),
    click.option("--prompt-file", metavar="FILE", help="Read the prompt from a file; - is standard input."),
]
COMPRESSION_OPTIONS = [
    click.option("--budget", type=float, metavar="X", help="Bytes to keep, as a fraction of the full 16-bit cache."),
    click.option("--budget-tokens", type=int, metavar="N", help="The same as whole 16-bit tokens a head."),
    click.option("--budget-bytes", type=int, metavar="N", help="The same as bytes over all layers."),
    click.option("--preset", metavar="NAME", help="Start from these settings; `rdkv plugins` lists presets."),
    *_pluggable("scorer"),
    *_pluggable("allocator"),
    *_pluggable("format"),
    click.option("--calibration", metavar="auto|none|FILE",
                 help="What to plan with: `rdkv calibrate`'s, the format's own, or a file's.  [default: auto]"),
    click.option("--budget-by", type=click.Choice(get_args(BudgetBy)),
                 help="Bytes by what a layer and a head are worth, if calibrated, or even.  [default: head]"),
]  # fmt: skip
# The names of these flags.
COMPRESSION_FLAGS = (
    "budget", "budget_tokens", "budget_bytes", "preset", "scorer", "scorer_options", "allocator", "allocator_options",
    "format", "format_options", "calibration", "budget_by",
)  # fmt: skip
RUN_OPTIONS: list[Callable[[Any], Any]] = [
    MODEL,
    *PROMPT_OPTIONS,
    click.option("--cache", metavar="FILE", help="Take the prompt that `rdkv compress` saved in FILE, and its model."),
    click.option("--question", metavar="TEXT", help="Ask this after the prompt; compression sees it."),
    CHAT,
    switch("compress-first", "Compress the prompt before the question is seen."),
    click.option("--max-new-tokens", type=int, metavar="N", help="Longest answer.  [default: 64]"),
    click.option(
        "--tail-block",
        type=int,
        metavar="N",
        help="Compress a long answer in blocks of N tokens, 0 for never.  [default: 1024]",
    ),
    *COMPRESSION_OPTIONS,
    BACKEND,
    PLUGIN,
    CONFIG,
    DEVICE,
    DTYPE,
    click.option("--seed", type=int, metavar="S", help="Seed of random numbers."),
    click.option("--temperature", type=float, metavar="T", help="Sample at this temperature.  [default: 0, greedy]"),
    click.option("--top-k", type=int, metavar="N", help="Sample from the N likeliest tokens.  [default: 0, all]"),
    click.option("--top-p", type=float, metavar="P", help="Sample from this share of the probability.  [default: 1]"),
    click.option(
        "--min-p",
        type=float,
        metavar="P",
        help="Sample from tokens at least this likely, beside the likeliest.  [default: 0]",
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text. Repeatable."),
    switch("full-cache", "Compress nothing, for comparison."),
    JSON,
    DEBUG,
]


def with_options(options: Sequence[Callable[[Any], Any]]) -> Callable[[Command], Command]:
    """Add flags to a command, in the order in which its help shows them."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add
