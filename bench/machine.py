"""The machine that a result was measured on."""

from __future__ import annotations

import platform

import torch
import transformers


def describe() -> dict[str, str]:
    """Device, processor and versions, for every line of results."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
