"""Keep progress bars and warnings of the libraries below us from mixing with our output."""

from __future__ import annotations

import logging
import os
import sys
import warnings

# Read when those libraries are imported, and passed on to processes started from here.
ENVIRONMENT = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # Threads of PyTorch that wait by spinning stall each other when other programs want the cores.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def silence_libraries() -> None:
    """Silence transformers and what it uses, whether or not it is imported yet; what the user set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    if "transformers" in sys.modules:
        from transformers.utils import logging as library

        library.disable_progress_bar()  # type: ignore[no-untyped-call]
        library.set_verbosity_error()  # type: ignore[no-untyped-call]


def log_to_stderr() -> None:
    """Show what rdkv reports of itself, such as a conversion that takes a while, as lines on standard error."""
    logger = logging.getLogger("rdkv")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("rdkv: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
