"""The command line: one group, its commands a file each, and how errors reach the user."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click

from .. import __version__
from .errors import RdkvError
from .quiet import log_to_stderr, silence_libraries

# Modules are imported when their command runs: `rdkv --help` must not wait for torch.
COMMANDS = {
    "generate": ("cli_generate", "Answer a prompt with a compressed cache."),
    "compress": ("cli_compress", "Read a prompt once and save its compressed cache for later questions."),
    "serve": ("cli_serve", "Serve a model with SGLang, its prompts compressed."),
    "inspect": ("cli_inspect", "Show what a prompt's cache is compressed to, layer by layer."),
    "plugins": ("cli_plugins", "List scorers, allocators, cache formats and presets."),
    "calibrate": ("cli_calibrate", "Measure what a cache format loses on a model."),
}
PROGRAM = "rdkv"


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{COMMANDS[cmd_name][0]}", __package__)
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name=PROGRAM)
def group() -> None:
    """Compress a prompt's KV cache to the bits that each token and channel is worth."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code.

    0 is success, 2 an error of the user's (one line on standard error), 1 any other failure. With
    ``--debug`` both kinds of error come with their traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    state = {"debug": "--debug" in arguments}  # a command may find it set in its configuration file
    if not state["debug"]:
        silence_libraries()
    log_to_stderr()
    try:
        group.main(args=arguments, prog_name=PROGRAM, standalone_mode=False, obj=state)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except (RdkvError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        return _fail(message, 2, state["debug"])
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130, debug=False)
    except BrokenPipeError:  # the reader of our output went away, which is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        hint = "" if state["debug"] else " (an error inside rdkv or a library; --debug shows where)"
        return _fail(f"{type(error).__name__}: {error}{hint}", 1, state["debug"])
    return 0


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return code
