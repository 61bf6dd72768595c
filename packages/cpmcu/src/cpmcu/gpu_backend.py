"""The decoder on a GPU: PyTorch and Triton kernels, and a CUDA graph for each decoded token.

The same model as `reference`, line by line. `_model` is the one description of it: a chunk of a
prompt goes through it in plain launches (`gpu_attention.Chunk`), a single token through one that
reads token and position from GPU memory (`gpu_attention.One`) and is therefore recorded once and
replayed (`cuda_graph`).

No GPU was at hand when this was written: it is tested in Triton's interpreter, its kernels are
compiled for sm80 and sm90, and nothing of it has been timed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpmcu import gpu_attention, gpu_device, plan, ternary
from cpmcu.cache import KVCache
from cpmcu.codes import BITS
from cpmcu.cuda_graph import Step
from cpmcu.gpu_attention import Chunk, One
from cpmcu.rope import RopeTable
from cpmcu.spec import ModelSpec
from cpmcu.weights import Layer, Weights

# (layer, queries, new keys and values) -> attention outputs
Attend = Callable[[int, Tensor, Tensor], Tensor]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def is_supported(spec: ModelSpec, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether this backend can run `spec` in `dtype`, and why not."""
    device, reason = gpu_device.find()
    if device is None:
        return False, reason
    if dtype not in DTYPES:
        return False, f"needs bfloat16, float16 or float32, got {dtype}"
    return gpu_attention.is_supported(spec, dtype, device)


def has_weights(quant: str, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether it multiplies such weights, and why not."""
    if quant == "ternary":
        return ternary.is_installed()
    own = str(dtype).removeprefix("torch.")
    if quant in ("auto", own, *BITS):
        return True, ""
    return False, f"in dtype {own} it has no {quant} weights"


class Decoder:
    """A model ready to run: `forward` appends tokens to a cache and returns logits.

    Args:
        spec: the model.
        weights: from `gpu_weights.pack_model`.
        dtype: of arithmetic, keys and values.
        device: where the weights are.
    """

    chunk = plan.GPU_CHUNK

    def __init__(
        self, spec: ModelSpec, weights: Weights, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.spec, self.weights, self.dtype, self.device = spec, weights, dtype, device
        self._rope = RopeTable(spec.rope, spec.head_dim, dtype, device)
        # For each cache the memory that its steps were made for, and those steps.
        self._steps: weakref.WeakKeyDictionary[KVCache, tuple[Any, dict[Any, Step]]] = (
            weakref.WeakKeyDictionary()
        )
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def describe(self) -> str:
        """The GPU, and whether its tokens are CUDA graphs or why not."""
        if self.device.type != "cuda":
            return "Triton's interpreter"
        reasons = {s.reason for _, steps in self._steps.values() for s in steps.values()}
        graphs = "; ".join(sorted(reasons - {""}))
        return f"{torch.cuda.get_device_name(self.device)}, {graphs or 'CUDA graphs'}"

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, cache: KVCache, *, length: int = 0, every: bool = False
    ) -> Tensor:
        """Run `tokens` (int64 [T], T >= 1, on the CPU) after those in `cache`, and append them.

        Args and returns: as `reference.Decoder.forward`; logits on the CPU.
        """
        with gpu_device.on(self.device):
            logits = self._logits(tokens, cache, length, every).float().cpu()
        cache.length += len(tokens)
        return logits if every else logits[0]

    def _logits(self, tokens: Tensor, cache: KVCache, length: int, every: bool) -> Tensor:
        """As `forward`, on the GPU; [1, vocab] or [T, vocab]."""
        start, end = cache.length, cache.length + len(tokens)
        cache.reserve(end)
        sparse = self.spec.sparse is not None and start + 1 >= self.spec.sparse.least_keys
        length = max(end, length)
        if len(tokens) == 1:
            step = self._step(cache, sparse=sparse, long=self.spec.rope.is_long(length))
            return step(int(tokens), start)
        cos, sin = self._rope.rows(start, end, length=length)
        attention = Chunk(self.spec, cache, start, end, sparse=sparse)
        return self._model(tokens.to(self.device), cos, sin, attention.attend, every=every)

    def _step(self, cache: KVCache, *, sparse: bool, long: bool) -> Step:
        """The computation of one token of this cache, where the cache's memory is now: of a token
        that attends to blocks, or to all keys, and with LongRoPE's angles of long sequences.
        """
        at = tuple(x.data_ptr() for x in (*cache.layers, *cache.fine, *cache.coarse))
        bound, steps = self._steps.get(cache, (None, {}))
        if bound != at:
            bound, steps = self._steps[cache] = at, {}
        kind = (sparse, long)
        if kind not in steps:
            length = self.spec.rope.original_context + 1 if long else 0
            tables = self._rope.rows(0, cache.layers[0].shape[2], length=length)
            attention = One(self.spec, cache, sparse=sparse)
            compute = functools.partial(self._one, tables, attention)
            steps[kind] = Step(compute, self.device, self._pool)
        return steps[kind]

    def _one(
        self, tables: tuple[Tensor, Tensor], attention: One, token: Tensor, position: Tensor
    ) -> Tensor:
        """Logits [1, vocab] after one token; token and position int64 [1]."""
        cos, sin = (table.index_select(0, position) for table in tables)
        attend = functools.partial(attention.attend, position, position + 1)
        return self._model(token, cos, sin, attend)

    def _model(
        self, ids: Tensor, cos: Tensor, sin: Tensor, attend: Attend, *, every: bool = False
    ) -> Tensor:
        """Logits [1, vocab] after the last of `ids` [T], or [T, vocab]."""
        spec, w = self.spec, self.weights
        x = w.embedding.rows(ids, self.dtype)
        if spec.embed_scale != 1.0:
            x = x * spec.embed_scale
        for i, layer in enumerate(w.layers):
            attended = attend(i, *self._heads(layer, x, cos, sin))
            x = torch.add(x, layer.output.multiply(attended), alpha=spec.residual_scale)
            x = torch.add(x, self._ffn(layer, x), alpha=spec.residual_scale)
        x = self._norm(x if every else x[-1:], w.norm)
        if spec.logit_scale != 1.0:
            x = x * spec.logit_scale
        return w.head.multiply(x)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.spec.rms_eps)

    def _ffn(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up.multiply(self._norm(x, layer.ffn_norm)).chunk(2, -1)
        return layer.down.multiply(F.silu(gate) * up)

    def _heads(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries [T, H, D]; rotated keys, and values, [2, K, T, D]."""
        H, K, D = self.spec.heads, self.spec.kv_heads, self.spec.head_dim
        qkv = layer.qkv.multiply(self._norm(x, layer.attention_norm), layer.qkv_bias)
        qkv = qkv.view(len(x), -1, D)
        qk = qkv[:, : H + K]
        if layer.q_norm is not None and layer.k_norm is not None:
            qk = torch.cat(
                (self._norm(qk[:, :H], layer.q_norm), self._norm(qk[:, H:], layer.k_norm)), 1
            )
        qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin)
        new = torch.stack((qk[:, H:], qkv[:, H + K :])).transpose(1, 2)
        return qk[:, :H], new
