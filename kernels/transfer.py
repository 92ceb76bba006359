"""Numbers from the device to the host and back, without waiting for anything else that the device is at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Readback:
    """Numbers on their way to the host: sent for now, waited for when they are read.

    Reading waits for the copy alone, and not for what the device was given to do after it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._arrived = tensor, None
        if tensor.is_cuda:
            # Pinned, or the copy would be waited for.
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Any:
        """The numbers, as `Tensor.tolist` gives them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


def send(numbers: Tensor, device: torch.device) -> Tensor:
    """The host's ``numbers`` on a device, in its turn there; neither is waited for."""
    if device.type == "cuda":
        numbers = numbers.pin_memory()  # or the copy might wait for what is before it
    return numbers.to(device, non_blocking=True)
