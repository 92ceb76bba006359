"""A scheduler's process that serves compressed prompts: its hooks, and what they share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.arena import Arena
from ...kernels.arena_shape import ArenaShape
from ...runtime.pipeline import Pipeline
from ...runtime.support import text_config
from .admission import coming
from .compressor import Compressor
from .hooks import hook
from .ledger import Ledger
from .metrics import Metrics
from .options import DEFAULT_WINDOW, parse
from .packing import Packing
from .refusals import NAME, check_model
from .sizes import arena_shape, first_head, needs, rank_config, rank_heads
from .windows import Chunk, QueryWindows

logger = logging.getLogger("sglang.rdkv")

POOLS = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes"
ADMISSION = "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req"
FORWARD = "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation"
RESULTS = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
STATE = "sglang.srt.managers.scheduler.Scheduler.get_internal_state"
RELEASE = "sglang.srt.mem_cache.memory_pool.ReqToTokenPool.free"
TRITON = "sglang.srt.utils.common.support_triton"


@dataclass(frozen=True)
class Packed:
    """A prompt that is packed, and whose slots in SGLang's pool are still to be given back.

    Attributes:
        place: the request's row in SGLang's tables when it was packed.
        tokens: of the prompt.
    """

    request: Any
    place: int
    tokens: int


class Serving:
    """One for a scheduler's process.

    Attributes:
        pipeline, shape: of this rank's heads, and of their arena; None until SGLang sizes its pools.
        ledger: of the arena's regions; empty until then.
        windows: queries of prompts that are being read.
        put_off: how often a request had to wait for room in the arena.
    """

    def __init__(self, server_args: Any) -> None:
        config = parse(getattr(server_args, "_rdkv_config", None))
        self.options, self.compression = config.options, config.compression
        self.server_args = server_args
        self.ledger = Ledger(0)
        self.windows = QueryWindows(DEFAULT_WINDOW)
        self.metrics = Metrics(server_args)
        self.pipeline: Pipeline | None = None
        self.shape: ArenaShape | None = None
        self.compressor: Compressor | None = None
        self.put_off = 0
        self._packed: list[Packed] = []
        self._packings: list[Packing] = []  # of the current pass

    def install(self) -> None:
        """Put every hook in place, and the backend under its name."""
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        register_attention_backend(NAME)(self.backend)
        targets: dict[str, tuple[Callable[..., Any], str]] = {
            POOLS: (self.share_memory, "AFTER"),
            ADMISSION: (self.admit, "AROUND"),
            FORWARD: (self.forward, "AROUND"),
            f"{RESULTS}.process_batch_result_prefill": (self.give_back, "AFTER"),
            RELEASE: (self.release, "BEFORE"),
            STATE: (self.describe, "AFTER"),
            TRITON: (_support_triton, "AFTER"),
        }
        hook(targets)

    def share_memory(self, available: int, configurator: Any, *more: Any, **named: Any) -> int:
        """Of the bytes for keys and values, those of SGLang's pool; the others are the arena's."""
        model = configurator.model_config
        check_model(model.hf_config)
        all_heads = text_config(model.hf_config).num_key_value_heads
        config = rank_config(self.compression, rank_heads(model), all_heads)
        self.pipeline = Pipeline(model.hf_config, config, first_head(model))
        self.shape = arena_shape(available, configurator, self.pipeline, self.options)
        self.ledger = Ledger(self.shape.nbytes)
        tables = self.shape.layers * self.shape.places * self.shape.table_bytes
        return available - sum(self.shape.store_bytes) - tables

    def backend(self, runner: Any) -> Any:
        """SGLang's attention backend, made once its pools are."""
        from .backend import make_backend

        assert self.pipeline is not None
        assert self.shape is not None
        device = runner.token_to_kv_pool.get_key_buffer(0).device
        arena = Arena(self.shape, device)
        self.windows.width = getattr(self.pipeline.scorer.options, "window", DEFAULT_WINDOW)
        self.compressor = Compressor(self.pipeline, arena, runner.token_to_kv_pool, runner.req_to_token_pool)
        self.compressor.check_format(self.windows.width)
        self._announce(runner)
        return make_backend(runner, self, arena)

    def _announce(self, runner: Any) -> None:
        assert self.shape is not None
        longest = runner.model_config.context_len
        each = self.region_bytes(longest)
        logger.info(
            "rdkv: arena of %.2f GB for %d tokens of prompts (%d prompts of %d tokens at once), "
            "beside %d tokens at 16 bits in SGLang's pool",
            sum(self.shape.store_bytes) / 1e9,
            self.shape.nbytes * longest // each,
            self.shape.nbytes // each,
            longest,
            runner.max_total_num_tokens,
        )

    def region_bytes(self, tokens: int) -> int:
        """Bytes of the region of a prompt of ``tokens`` tokens, known before it is read; of a layer, on average."""
        assert self.pipeline is not None
        assert self.shape is not None
        return self.shape.region_bytes(needs(self.shape, self.pipeline.config, tokens, self.pipeline.shares))

    def admit(self, original: Callable[..., Any], adder: Any, request: Any, *more: Any, **named: Any) -> Any:
        """Let a request wait until there is room in the arena; a prompt that it never holds stays in the pool."""
        from sglang.srt.managers.schedule_policy import AddReqResult

        tokens = len(request.full_untruncated_fill_ids)
        size = self.region_bytes(tokens)
        wanted = tokens >= self.options.min_tokens and size <= self.ledger.capacity
        if wanted and not self.ledger.reserve(request.rid, size):
            self.put_off += 1
            return AddReqResult.NO_TOKEN
        if adder.req_states is None:
            adder.req_states = coming(adder, self.ledger)
        result = original(adder, request, *more, **named)
        if wanted and not any(other is request for other in adder.can_run_list):
            self.ledger.release(request.rid)
        self.metrics.arena(self.ledger)
        if result == AddReqResult.NO_TOKEN and self._slots_come_back(adder):
            return AddReqResult.OTHER  # SGLang takes "no token" to last until a request ends
        return result

    def _slots_come_back(self, adder: Any) -> bool:
        """Whether slots will be free without a request's end: those of prompts that are being read, or packed."""
        return bool(self._packed) or any(self.ledger.region(other.rid) is not None for other in adder.can_run_list)

    def forward(self, original: Callable[..., Any], worker: Any, batch: Any, *more: Any, **named: Any) -> Any:
        """Run a batch; the prompts that it ends are packed on the way, see `read`."""
        reading = batch is not None and batch.forward_mode.is_extend()
        requests = batch.reqs if reading else []
        self.windows.chunks = [
            Chunk(r.rid, r.extend_range.start, r.extend_range.end, len(r.full_untruncated_fill_ids)) for r in requests
        ]
        ending = [(r, c.total) for r, c in zip(requests, self.windows.chunks, strict=True) if c.end == c.total]
        packings = [(r, packing) for r, tokens in ending if (packing := self._pack(r, tokens)) is not None]
        self._packings = [packing for _, packing in packings]
        result = original(worker, batch, *more, **named)
        for request, packing in packings:
            self.metrics.compressed(request.rid, packing.tokens, packing.finish())
            self._packed.append(Packed(request, packing.place, packing.tokens))
        for request, _ in ending:
            self.windows.drop(request.rid)
        self.windows.chunks, self._packings = (), []
        return result

    def _pack(self, request: Any, tokens: int) -> Packing | None:
        """What packs a prompt whose last tokens are about to be read; None for one that stays in the pool."""
        assert self.compressor is not None
        region = self.ledger.region(request.rid)
        if region is None:
            self.compressor.skip(request.req_pool_idx)
            return None
        return Packing(self.compressor, request.req_pool_idx, tokens, region, self.windows, request.rid)

    def read(self, layer: int) -> None:
        """A layer has read its part of the batch: pack the prompts that end there."""
        for packing in self._packings:
            packing.read(layer)

    def give_back(self, result: Any, processor: Any, *more: Any, **named: Any) -> None:
        """Give the slots of packed prompts back to SGLang's pool, once it has taken note of the batch."""
        packed, self._packed = self._packed, []
        for prompt in packed:
            request = prompt.request
            if request.req_pool_idx != prompt.place:
                continue  # it has ended, or was retracted: all its slots are free already
            row = processor.req_to_token_pool.req_to_token[prompt.place]
            processor.token_to_kv_pool_allocator.free(row[: prompt.tokens].clone())
            row[: prompt.tokens] = 0  # the pool's padding, which nobody owns
            request.cache_protected_len = prompt.tokens  # SGLang frees what comes after it

    def release(self, pool: Any, request: Any, *more: Any, **named: Any) -> None:
        """A request leaves its place: finished, aborted or retracted."""
        self.ledger.release(request.rid)
        self.windows.drop(request.rid)
        self.metrics.arena(self.ledger)

    def describe(self, result: Any, scheduler: Any, *more: Any, **named: Any) -> None:
        """Tell of the arena in SGLang's server information."""
        result.internal_state[NAME] = {
            "arena_bytes": self.ledger.capacity,  # of a layer, on average, as those used
            "arena_used_bytes": self.ledger.used,
            "compressed_sequences": len(self.ledger),
            "prompts_being_read": len(self.windows),
            "admissions_put_off": self.put_off,
        }


def _support_triton(answer: bool, backend: str) -> bool | None:
    """SGLang's own Triton kernels need a GPU, whatever the name of the backend."""
    return answer and torch.cuda.is_available() if backend == NAME else None
