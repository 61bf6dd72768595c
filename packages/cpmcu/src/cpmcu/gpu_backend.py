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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpmcu import dtypes, gpu_attention, gpu_device, plan, ternary
from cpmcu.cache import KVCache
from cpmcu.codes import BITS
from cpmcu.cuda_graph import Step
from cpmcu.gpu_attention import Chunk, One
from cpmcu.rope import RopeTable
from cpmcu.spec import ModelSpec
from cpmcu.weights import Weights


def is_supported(spec: ModelSpec, dtype: str | torch.dtype) -> tuple[bool, str]:
    """Whether this backend can run `spec` in `dtype`, and why not."""
    name = dtypes.name_of(dtype)
    device, reason = gpu_device.find()
    if device is None:
        return False, reason
    if name not in dtypes.FLOATS:
        return False, f"needs bfloat16, float16 or float32, got {name}"
    return gpu_attention.is_supported(spec, getattr(torch, name), device)


def has_weights(quant: str, dtype: str | torch.dtype) -> tuple[bool, str]:
    """Whether it multiplies such weights, and why not."""
    if quant == "ternary":
        return ternary.is_installed()
    own = dtypes.name_of(dtype)
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
        if end > cache.layers[0].shape[2]:  # its memory will move: let go of what holds the old
            self._steps.pop(cache, None)
        cache.reserve(end)
        sparse = self.spec.sparse is not None and start + 1 >= self.spec.sparse.least_keys
        length = max(end, length)
        if len(tokens) == 1:
            step = self._step(cache, sparse=sparse, long=self.spec.rope.is_long(length))
            return step(int(tokens), start)
        tables = self._tables(cache, self.spec.rope.is_long(length))
        attention = Chunk(self.spec, cache, start, end, sparse=sparse)
        first = torch.tensor([start], device=self.device)
        return self._model(tables, attention, tokens.to(self.device), first, every=every)

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
            attention = One(self.spec, cache, sparse=sparse)
            compute = functools.partial(self._model, self._tables(cache, long), attention)
            steps[kind] = Step(compute, self.device, self._pool)
        return steps[kind]

    def _tables(self, cache: KVCache, long: bool) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions that the cache has room for."""
        length = self.spec.rope.original_context + 1 if long else 0
        return self._rope.rows(0, cache.layers[0].shape[2], length=length)

    def _model(
        self, tables: tuple[Tensor, Tensor], attention: Chunk | One, ids: Tensor,
        position: Tensor, *, every: bool = False,
    ) -> Tensor:  # fmt: skip
        """Logits [1, vocab] after the last of `ids` [T], or [T, vocab]; position, int64 [1], is
        that of the first.
        """
        from cpmcu.triton_rotate import rotate
        from cpmcu.triton_rows import add_norm, gated

        spec, w, eps = self.spec, self.weights, self.spec.rms_eps
        x = w.embedding.rows(ids, self.dtype)
        if spec.embed_scale != 1.0:
            x = x * spec.embed_scale
        keys = position + len(ids)
        after = [*(layer.attention_norm for layer in w.layers[1:]), w.norm]
        h = F.rms_norm(x, (spec.hidden,), w.layers[0].attention_norm, eps)
        for i, (layer, next_norm) in enumerate(zip(w.layers, after, strict=True)):
            qkv, norms = layer.qkv.multiply(h, layer.qkv_bias), (layer.q_norm, layer.k_norm)
            q = rotate(qkv, norms, tables, position, attention.layers[i], spec.heads, eps)
            y = layer.output.multiply(attention.attend(i, q, position, keys))
            x, h = add_norm(x, y, layer.ffn_norm, alpha=spec.residual_scale, eps=eps)
            y = layer.down.multiply(gated(layer.gate_up.multiply(h)))
            x, h = add_norm(x, y, next_norm, alpha=spec.residual_scale, eps=eps)
        h = h if every else h[-1:]
        return w.head.multiply(h if spec.logit_scale == 1.0 else h * spec.logit_scale)
