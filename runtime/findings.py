"""What is found about plugins' results while the device is still at work, read all at once later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Finding:
    """Figures of a plugin's result that may still be on their way on the device, and what is wrong if they are.

    Attributes:
        figures: ``[n]`` float64.
        judge: raises a `PluginError` for figures, as numbers, that break the contract.
    """

    figures: Tensor
    judge: Callable[[list[float]], None]


def settle(findings: Sequence[Finding]) -> list[list[float]]:
    """Read the figures of all findings, in one transfer.

    Returns:
        The figures of each finding.

    Raises:
        PluginError: of the first finding that has something to object to.
    """
    numbers = torch.cat([finding.figures for finding in findings]).tolist()
    figures = [[numbers.pop(0) for _ in finding.figures] for finding in findings]
    for finding, own in zip(findings, figures, strict=True):
        finding.judge(own)
    return figures
