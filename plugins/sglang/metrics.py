"""What compression does, on SGLang's Prometheus endpoint and in its log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .ledger import Ledger

if TYPE_CHECKING:
    from .packing import Done

logger = logging.getLogger("sglang.rdkv")

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # upper bounds of the histogram's buckets


class Metrics:
    """Counters of one scheduler; nothing is counted unless the server was started with ``--enable-metrics``."""

    def __init__(self, server_args: Any) -> None:
        self._on = bool(getattr(server_args, "enable_metrics", False))
        if not self._on:
            return
        from prometheus_client import Counter, Gauge, Histogram  # after SGLang has set where processes keep theirs

        labels = {"model_name": server_args.served_model_name}
        names = tuple(labels)
        mode = {"multiprocess_mode": "mostrecent"}
        self._held = Gauge("rdkv:compressed_sequences", "Prompts in the arena.", names, **mode).labels(**labels)
        self._used = Gauge("rdkv:arena_use", "Used share of the arena.", names, **mode).labels(**labels)
        self._packed = Counter("rdkv:packed_bytes", "Bytes of packed prompts.", names).labels(**labels)
        self._full = Counter("rdkv:full_bytes", "Bytes of the same prompts at 16 bits.", names).labels(**labels)
        self._kept = Gauge("rdkv:retention", "Packed share of the last prompt's bytes.", names, **mode).labels(**labels)
        self._seconds = Histogram("rdkv:compress_seconds", "Time to pack a prompt.", names, buckets=SECONDS).labels(
            **labels
        )

    def arena(self, ledger: Ledger) -> None:
        """Note how full the arena is."""
        if self._on and ledger.capacity:
            self._held.set(len(ledger))
            self._used.set(ledger.used / ledger.capacity)

    def compressed(self, request: str, tokens: int, done: Done) -> None:
        """Note a prompt that was packed."""
        retention = done.nbytes / done.full_nbytes
        logger.debug(
            "rdkv: request %s: %d tokens packed to %d bytes, %.2f%% of 16 bits, in %.1f ms",
            request,
            tokens,
            done.nbytes,
            100 * retention,
            1e3 * done.seconds,
        )
        if self._on:
            self._packed.inc(done.nbytes)
            self._full.inc(done.full_nbytes)
            self._kept.set(retention)
            self._seconds.observe(done.seconds)
