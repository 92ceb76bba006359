"""Means over tasks with bootstrap intervals, and paired differences of methods on the same prompts."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS, SEED = 2000, 0
Prompt = tuple[str, str]  # task, and which of its prompts
Values = Mapping[Prompt, float]


@dataclass(frozen=True)
class Estimate:
    """The mean over tasks of the mean over a task's prompts, its 95% bootstrap interval, and the number of prompts.

    The bootstrap draws prompts anew within each task; tasks of one prompt, which have no spread of their own, are drawn
    anew among themselves. One prompt alone has an interval without width.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def beyond_zero(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def estimate(values: Values) -> Estimate | None:
    """Of one figure a prompt; None if there are none."""
    tasks: defaultdict[str, list[float]] = defaultdict(list)
    for prompt in sorted(values):
        tasks[prompt[0]].append(values[prompt])
    if not tasks:
        return None
    single = [part[0] for part in tasks.values() if len(part) == 1]
    draws = sum(_resampled(task, np.array(part)) for task, part in tasks.items() if len(part) > 1)
    if single:
        draws = draws + len(single) * _resampled("tasks of one prompt", np.array(single))
    low, high = np.quantile(draws / len(tasks), [0.025, 0.975])
    mean = np.mean([np.mean(part) for part in tasks.values()])
    return Estimate(float(mean), float(low), float(high), len(values))


def difference(values: Values, reference: Values) -> Estimate | None:
    """Of what ``values`` have more than ``reference``, on the prompts that both have."""
    return estimate({prompt: values[prompt] - reference[prompt] for prompt in values.keys() & reference.keys()})


def _resampled(task: str, part: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of ``DRAWS`` samples of a task, each as large as it is; the same ones whatever other tasks there are."""
    generator = np.random.default_rng([SEED, zlib.crc32(task.encode())])
    drawn: NDArray[np.float64] = part[generator.integers(0, len(part), (DRAWS, len(part)))].mean(1)
    return drawn
