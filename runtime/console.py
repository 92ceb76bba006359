"""Tables on a terminal, and the same tables in a pipe."""

from __future__ import annotations

import sys

from rich.console import Console

PIPE_WIDTH = 160  # without a terminal there is no width to fit


def console() -> Console:
    """A console on standard output that marks nothing up by itself: names and numbers stay as they are."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, highlight=False, markup=False)
