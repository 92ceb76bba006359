"""lm-evaluation-harness's command line with the model ``rdkv``, for versions that read no entry points (to 0.4.13).

python -m rdkv.plugins.lm_eval run --model rdkv --model_args pretrained=M,budget=0.05 --tasks ...
"""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate

from rdkv.runtime.errors import RdkvError

from . import model as model  # registers itself


def main() -> None:
    """Run it; an error of rdkv's is one line."""
    try:
        cli_evaluate()
    except RdkvError as error:
        print(f"rdkv: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
