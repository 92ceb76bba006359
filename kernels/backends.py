"""What computes attention over a packed prompt and its tail: plain PyTorch, Triton kernels, or FlashInfer.

A backend that does not work, or fails in use, is a message and the next best one, never an error.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import ClassVar

import torch
from torch import Tensor

from . import naive_decode
from .packed import Packed
from .tail import Tail

logger = logging.getLogger("rdkv")

NAMES = ("torch", "triton", "flashinfer")
CAPABILITY = (8, 0)  # the least compute capability with what the kernels use

_failures: dict[str, str] = {}  # what failed in use in this process, and how


class Backend(ABC):
    """Attention over packed prompts; keeps what it plans for each for as long as the prompt lives."""

    name: ClassVar[str]

    @abstractmethod
    def attend(self, query: Tensor, packed: Packed, scale: float, tail: Tail | None = None) -> tuple[Tensor, Tensor]:
        """Attention of ``query`` ``[B, H_q, Q, D]``, each of which sees all of the prompt and the tail.

        Where ``packed`` has more sequences, ``i``, ``B + i``, ``2 B + i`` and so on are parts of the same one.

        Returns:
            Output ``[B, H_q, Q, D]``, float32 without a tail and in the type of ``query`` or float32 with one, and
            log-sum-exp to base 2 ``[B, H_q, Q]`` float32, minus infinity (and output 0) where there is no token.
        """

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held."""
        yield from ()


class TorchBackend(Backend):
    """Plain PyTorch: unpacks the prompt each time."""

    name = "torch"

    def attend(self, query: Tensor, packed: Packed, scale: float, tail: Tail | None = None) -> tuple[Tensor, Tensor]:
        return naive_decode.attend(query, packed, scale, tail)


def probe(device: torch.device) -> list[tuple[str, bool, str]]:
    """Each backend's name, whether it works on ``device``, and one line on why (not)."""
    return [(name, *_verdict(name, device)) for name in NAMES]


def automatic(device: torch.device) -> str:
    """The fastest backend that works on ``device``."""
    compiled = device.type == "cuda" and not _interpreted()
    return "triton" if compiled and _verdict("triton", device)[0] else "torch"


def choose(name: str, device: torch.device) -> Backend:
    """The backend called ``name``, or the automatic choice if that does not work on ``device`` (or is ``auto``).

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in (*NAMES, "auto"):
        raise ValueError(f"unknown attention backend {name!r}; there are auto, {', '.join(NAMES)}")
    works, reason = (False, "") if name == "auto" else _verdict(name, device)
    taken = name if works else automatic(device)
    if name not in ("auto", taken):
        say(f"attention backend {name!r} does not work here ({reason}); {taken!r} takes its place")
    if taken == "triton":
        from .backend_triton import TritonBackend

        return TritonBackend()
    if taken == "flashinfer":
        from .backend_flashinfer import FlashInferBackend

        return FlashInferBackend()
    return TorchBackend()


class ChosenBackend(Backend):
    """The backend of a name, chosen when it is first used; replaced for good if it fails in use."""

    def __init__(self, name: str) -> None:
        self.wanted = name
        self.backend: Backend | None = None

    def attend(self, query: Tensor, packed: Packed, scale: float, tail: Tail | None = None) -> tuple[Tensor, Tensor]:
        if self.backend is None:
            self.backend = choose(self.wanted, query.device)
        try:
            return self.backend.attend(query, packed, scale, tail)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, a kernel that the device refuses, a library of another version, ...
            failed = self.backend.name
            if failed == "torch" or _captures(query.device):  # what a graph does not take works outside it
                raise
            _failures[failed] = f"failed in use: {_one_line(error)}"
            self.backend = choose(failed, query.device)  # which says so
        return self.attend(query, packed, scale, tail)

    def tensors(self) -> Iterator[Tensor]:
        if self.backend is not None:
            yield from self.backend.tensors()


@cache
def say(message: str) -> None:
    """Report something once in this process."""
    logger.warning(message)


def _verdict(name: str, device: torch.device) -> tuple[bool, str]:
    """Whether a backend works on ``device``, and why (not)."""
    if name in _failures:
        return False, _failures[name]
    if name == "torch":
        return True, "plain PyTorch: runs anywhere, unpacks the prompt for every token"
    if name == "triton":
        return _triton(device)
    if device.type != "cuda":
        return False, "needs a CUDA device"
    if missing := _import_error("flashinfer"):
        return False, missing
    works, reason = _triton(device)
    if not works:
        return False, f"needs triton for the packed zones: {reason}"
    return True, "16-bit zones by FlashInfer; auto prefers triton, which takes all zones in one launch"


def _triton(device: torch.device) -> tuple[bool, str]:
    if device.type != "cuda" and not _interpreted():
        return False, "needs a CUDA device"
    if missing := _import_error("triton"):
        return False, missing
    if _interpreted():
        return True, "Triton's interpreter (TRITON_INTERPRET=1): for tests, slow"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        has, least = (".".join(map(str, c)) for c in (capability, CAPABILITY))
        return False, f"needs a GPU of compute capability {least}; this one has {has}"
    return True, "reads packed codes; all zones of a batch in one launch, and one that merges"


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _import_error(module: str) -> str | None:
    """Why a module cannot be imported, None if it can; an installation may be broken in any way."""
    try:
        import_module(module)
    except Exception as error:
        return _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ImportError) else f"{type(error).__name__}: {text}"
