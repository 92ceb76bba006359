"""SGLang's attention backend over the arena: prompts are read by a backend of SGLang's, decoding is ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from ...kernels.arena import Arena
from ...runtime.errors import ConfigError
from .attention import Decode, KernelDecode, PlainDecode

if TYPE_CHECKING:
    from .serving import Serving


def make_backend(runner: Any, serving: Serving, arena: Arena) -> RdkvBackend:
    """The backend of a model runner.

    Raises:
        ConfigError: SGLang has no backend of the name that is to read prompts.
    """
    name = serving.options.prefill or ("triton" if torch.cuda.is_available() else "torch_native")
    if name not in ATTENTION_BACKENDS or name == "rdkv":
        raise ConfigError(f"--rdkv-config: prefill is {name!r}, which is no attention backend of SGLang's")
    return RdkvBackend(ATTENTION_BACKENDS[name](runner), runner, serving, arena)


class RdkvBackend(AttentionBackend):  # type: ignore[misc]
    """Prompts by ``prefill``, which are packed on the way; decoding over packed prompts and the pool's tokens."""

    needs_cpu_seq_lens = False

    def __init__(self, prefill: Any, runner: Any, serving: Serving, arena: Arena) -> None:
        super().__init__()
        self._prefill, self._pool, self._serving = prefill, runner.token_to_kv_pool, serving
        assert serving.compressor is not None
        self._decode: Decode
        if torch.cuda.is_available() and serving.compression.backend != "torch":
            self._decode = KernelDecode(arena, runner)
        else:
            self._decode = PlainDecode(arena, serving.compressor.host_counts, runner)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        if forward_batch.forward_mode.is_decode_or_idle():
            self._decode.prepare(forward_batch.req_pool_indices, forward_batch.seq_lens)
        else:
            self._prefill.init_forward_metadata(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing: each batch size that is captured gets its own, see `init_forward_metadata_out_graph`."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1  # of padding: one token, the pool's slot 0

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if in_capture:
            self._decode.reserve(forward_batch.batch_size)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        self._decode.prepare(forward_batch.req_pool_indices, forward_batch.seq_lens)

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **more: Any
    ) -> Tensor:
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        self._serving.windows.keep(layer.layer_id, queries, layer.scaling)
        output: Tensor = self._prefill.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **more)
        self._serving.read(layer.layer_id)
        return output

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **more: Any
    ) -> Tensor:
        if save_kv_cache:
            self._pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        query = q.view(-1, layer.tp_q_head_num, 1, layer.qk_head_dim)  # [B, H_q, 1, D]
        output = self._decode.attend(layer.layer_id, query, layer.scaling)
        return output.reshape(q.shape[0], -1)

    def support_triton(self) -> bool:
        return torch.cuda.is_available()
