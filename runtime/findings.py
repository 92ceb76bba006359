"""What is found about plugins' results while the device is still at work, read all at once later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.transfer import Readback


@dataclass(frozen=True)
class Finding:
    """Figures of a plugin's result that may still be on their way on the device, and what is wrong if they are.

    Attributes:
        figures: ``[n]`` float64.
        judge: raises a `PluginError` for figures, as numbers, that break the contract.
    """

    figures: Tensor
    judge: Callable[[list[float]], None]


class Inquiry:
    """Findings whose figures are sent for together; what the device is given after that is not waited for."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self._findings = findings
        self._figures = Readback(torch.cat([finding.figures for finding in findings]))

    def settle(self) -> list[list[float]]:
        """Read the figures, and judge them.

        Returns:
            The figures of each finding.

        Raises:
            PluginError: of the first finding that has something to object to.
        """
        numbers: list[float] = self._figures.read()
        figures = [[numbers.pop(0) for _ in finding.figures] for finding in self._findings]
        for finding, own in zip(self._findings, figures, strict=True):
            finding.judge(own)
        return figures


def settle(findings: Sequence[Finding]) -> list[list[float]]:
    """`Inquiry.settle`, for who can wait for the device."""
    return Inquiry(findings).settle()
