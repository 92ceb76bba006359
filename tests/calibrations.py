"""Calibration files for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from rdkv.plugins.rdkv.format import DISTORTIONS
from rdkv.runtime.calibration import Calibration


def written(path: Path, **changes: Any) -> str:
    """The path of a file that holds a calibration of ``mixed-bit`` with some fields changed."""
    made = Calibration(
        format="mixed-bit", fingerprint="0", model="m", text="t", tokens=1, skipped=0, distortion=DISTORTIONS["smollm2"]
    )
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(made, **changes)))
    return str(path)
