"""Attention of a CPU engine, a whole batch at a time. Loaded only inside the SGLang server's scheduler process.

Without AMX, SGLang on a CPU attends request by request, layer by layer, from Python; and a request that extends a cached
prefix by one token pays for the square of its whole length, because the prefix's queries are padded in. Group sampling
is made of exactly these two cases: 8 samples of a prompt extend it by one token each, then decode together. So those are
computed as one batch, and longer stretches for their own queries only (`batched_attention.py`).

SGLang has a registry of attention backends, and this takes the place of `torch_native` in it, in this process only: the
rest of SGLang asks for that name to decide that no Triton kernel may be used. Everything this does not handle (sliding
windows, cross attention) goes to the original.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from megatron_spice.rollout.batched_attention import Step, attend, plan_step


class BatchedAttention(TorchNativeAttnBackend):
    """SGLang's native torch backend with the two methods that run a layer replaced."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._dtype = model_runner.dtype
        self._step: Step | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Called by SGLang once before each forward pass."""
        super().init_forward_metadata(forward_batch)
        self._step = None
        mode = forward_batch.forward_mode
        lengths = forward_batch.seq_lens.tolist()
        if not lengths or forward_batch.encoder_lens is not None:
            return
        if mode.is_decode():
            queries = [1] * len(lengths)
        elif mode.is_extend():
            queries = forward_batch.extend_seq_lens.tolist()
        else:
            return
        if min(queries) > 0:
            table = self.req_to_token_pool.req_to_token
            self._step = plan_step(table, forward_batch.req_pool_indices, lengths, queries, self._dtype)

    def _run(self, original: Any, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save: bool) -> Any:
        window = layer.sliding_window_size
        plain = (
            layer.attn_type == AttentionType.DECODER
            and not layer.is_cross_attention
            and (window is None or window < 0)
            and q.dtype == self._dtype
        )
        if self._step is None or not plain:
            return original(q, k, v, layer, forward_batch, save)
        if save and k is not None and v is not None:
            where = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v)
        output = attend(
            self._step,
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            layer.scaling,
        )
        return output.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def forward_extend(
        self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """A layer of a pass that reads prompts."""
        return self._run(super().forward_extend, q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """A layer of a pass that continues every request by one token."""
        return self._run(super().forward_decode, q, k, v, layer, forward_batch, save_kv_cache)


def register() -> None:
    """Makes this process's `torch_native` backend the batched one."""
    register_attention_backend("torch_native")(BatchedAttention)
