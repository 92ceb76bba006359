"""A stand-in for a device that works by itself: it notes whenever the host waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

# Methods of a tensor by which the host learns what the device found out.
ASKING = ("tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")


class Waits:
    """Watches every tensor, and the `Readback` of some modules.

    Attributes:
        seen: what the host waited for, in order: methods of a tensor, and ``readback`` for what it had sent for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
        self.seen: list[str] = []
        self._watched = True
        for name in ASKING:
            monkeypatch.setattr(Tensor, name, self._noted(name, getattr(Tensor, name)))
        waits = self

        class Readback:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor

            def read(self) -> Any:
                waits.seen.append("readback")
                with waits.aside():
                    return self.tensor.tolist()

        for module in modules:
            monkeypatch.setattr(f"{module}.Readback", Readback)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Look away from what is the device's own, such as a kernel in Triton's interpreter."""
        before, self._watched = self._watched, False
        try:
            yield
        finally:
            self._watched = before

    def unseen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, aside."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.aside():
                return function(*args, **kwargs)

        return run

    def _noted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._watched:
                self.seen.append(name)
            return method(tensor, *args, **kwargs)

        return run
