"""Runs the decode steps of a batch: step by step, or by one captured CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.draws import Draws, choose
from .batch import Batch
from .forward import Forward
from .sampling import Sampling

logger = logging.getLogger("rdkv")

WARM_UP = 2  # steps before one is captured: they compile kernels and make plans


class Runner:
    """A batch and the tokens that it is about to read.

    Attributes:
        tokens: ``[B]`` int64, each sequence's newest one, on the device.
        captures: whether steps are captured in a graph.
    """

    @torch.inference_mode()
    def __init__(self, forward: Forward, batch: Batch, logits: Tensor, samplings: Sequence[Sampling]) -> None:
        """``logits`` ``[B, V]`` are those of each sequence's last position; the first tokens are chosen from them."""
        self._forward, self.batch = forward, batch
        self._draws = draws(samplings, logits.device)
        self.tokens = choose(logits, self._draws, batch.positions + 1)
        self.captures = logits.is_cuda and forward.capturable
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = 0

    @property
    def captured(self) -> bool:
        """Whether the next step is a replay of a graph, unless buffers are exchanged for it."""
        return self._graph is not None

    @torch.inference_mode()
    def step(self) -> None:
        """Read the tokens and choose the next ones; the device is not waited for."""
        if self.batch.reserve():
            self._graph, self._warm = None, 0  # the graph knows the old buffers and parts
        if not self.captures:
            self._advance()
        elif self._warm < WARM_UP:
            self._advance_aside()
            self._warm += 1
        else:
            if self._graph is None:
                self._capture()
            if self._graph is not None:
                self._graph.replay()
            else:
                self._advance()

    def _advance(self) -> None:
        self.batch.advance()
        logits = self._forward.step(self.tokens, self.batch)
        self.tokens.copy_(choose(logits, self._draws, self.batch.positions + 1))

    def _advance_aside(self) -> None:
        """A step on a stream of its own, as the steps before a capture have to be."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._advance()
        torch.cuda.current_stream().wait_stream(aside)

    def _capture(self) -> None:
        """A graph of one step; if there can be none, steps go on without."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._advance()
        except Exception as error:
            logger.warning(f"decode steps run without a CUDA graph, since capturing one failed: {error}")
            self.captures = False
        else:
            self._graph = graph


def draws(samplings: Sequence[Sampling], device: torch.device) -> Draws:
    """How each sequence is sampled; one without a seed gets one by PyTorch's random numbers."""

    def seed(sampling: Sampling) -> int:
        return int(torch.randint(2**63 - 1, ())) if sampling.seed is None else sampling.seed

    return Draws.of(
        [s.temperature for s in samplings],
        [s.top_k for s in samplings],
        [s.top_p for s in samplings],
        [s.min_p for s in samplings],
        [seed(s) if s.temperature > 0 else 0 for s in samplings],
        device,
    )
