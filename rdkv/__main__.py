"""``python -m rdkv`` and the console script ``rdkv``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from .runtime.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
