"""The decoder in plain PyTorch: the definition every faster backend must equal.

Llama-family layers (arXiv:2302.13971) with grouped-query attention (arXiv:2305.13245) and the
µP multipliers of MiniCPM (arXiv:2404.06395). Letters: T new tokens, S tokens in the cache after
them, H query heads, K key-value heads, D head dimension. One sequence, so no batch axis.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from typing import TYPE_CHECKING

from cpmcu import dtypes, int8_rows, plan
from cpmcu._torch import torch
from cpmcu.cache import KVCache
from cpmcu.rope import RopeTable
from cpmcu.sparse import SparseAttention
from cpmcu.spec import ModelSpec
from cpmcu.weights import Layer, Weights

if TYPE_CHECKING:
    from torch import Tensor

F = torch.nn.functional


def is_supported(spec: ModelSpec, dtype: str | torch.dtype) -> tuple[bool, str]:
    """Whether this backend can run `spec` in `dtype`, and why not."""
    if dtypes.name_of(dtype) not in ("float32", "bfloat16"):
        return False, f"needs float32 or bfloat16, got {dtypes.name_of(dtype)}"
    if spec.sparse is not None and importlib.util.find_spec("infllm2") is None:
        return False, "sparse attention in PyTorch needs infllm2: pip install minicpm4-infllm2"
    return True, ""


class Decoder:
    """A model ready to run: `forward` appends tokens to a cache and returns logits."""

    chunk, device = plan.CHUNK, torch.device("cpu")

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        weights.layers = list(weights.layers)  # they may be read only now
        self.spec, self.weights = spec, weights
        self._rope = RopeTable(spec.rope, spec.head_dim, weights.embedding.dtype)

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, cache: KVCache, *, length: int = 0, every: bool = False
    ) -> Tensor:
        """Run `tokens` (int64 [T], T >= 1) after those in `cache`, and append them to it.

        Args:
            tokens: ids below the vocabulary size.
            cache: the sequence so far; its `length` grows by T.
            length: tokens in the sequence once the whole prompt is in, where this call is one
                chunk of it (LongRoPE chooses its factors by that length).
            every: return the logits of all T positions instead of the last.

        Returns:
            Logits, fp32 [vocab], or [T, vocab] with `every`.
        """
        spec, w = self.spec, self.weights
        start, end = cache.length, cache.length + len(tokens)
        cache.reserve(end)
        cos, sin = self._rope.rows(start, end, length=max(end, length))
        mask = self._mask(start, end)
        x = F.embedding(tokens, w.embedding)
        if spec.embed_scale != 1.0:
            x = x * spec.embed_scale
        for layer, arena in zip(w.layers, cache.layers, strict=True):
            attended = self._attention(layer, x, arena, start, cos, sin, mask)
            x = torch.add(x, F.linear(attended, layer.output), alpha=spec.residual_scale)
            x = torch.add(x, self._ffn(layer, x), alpha=spec.residual_scale)
        cache.length = end
        x = self._norm(x if every else x[-1], w.norm)
        if spec.logit_scale != 1.0:
            x = x * spec.logit_scale
        return F.linear(x, w.head).float()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.spec.rms_eps)

    def _ffn(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = F.linear(self._norm(x, layer.ffn_norm), layer.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, layer.down)

    def _attention(
        self,
        layer: Layer,
        x: Tensor,
        arena: Tensor,
        start: int,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Write the new keys and values into `arena`, return attention outputs [T, H * D]."""
        spec, t = self.spec, len(x)
        H, K, D = spec.heads, spec.kv_heads, spec.head_dim
        end = start + t
        qkv = F.linear(self._norm(x, layer.attention_norm), layer.qkv, layer.qkv_bias).view(
            t, -1, D
        )
        qk_TND = qkv[:, : H + K]
        if layer.q_norm is not None and layer.k_norm is not None:
            qk_TND = torch.cat(
                (self._norm(qk_TND[:, :H], layer.q_norm), self._norm(qk_TND[:, H:], layer.k_norm)),
                1,
            )
        qk_TND = torch.addcmul(qk_TND * cos, qk_TND.roll(D // 2, -1), sin)
        new = torch.stack((qk_TND[:, H:], qkv[:, H + K :])).transpose(1, 2)
        arena[:, :, start:end] = int8_rows.to_rows(new) if spec.int8_cache else new
        first = max(0, end - spec.window) if spec.window and t == 1 else 0
        seen = arena[:, :, first:end]
        k_KSD, v_KSD = int8_rows.from_rows(seen, x.dtype) if spec.int8_cache else seen
        if spec.sparse is not None and start + 1 >= spec.sparse.least_keys:
            out = _sparse_attention(qk_TND[None, :, :H].transpose(1, 2), k_KSD, v_KSD, spec.sparse)
            return out[0].transpose(0, 1).reshape(t, H * D)
        if t == 1:
            # The heads of a group share their keys: as rows of one query they read them once.
            q_KGD = qk_TND[0, :H].view(K, H // K, D)
            out = F.scaled_dot_product_attention(q_KGD[None], k_KSD[None], v_KSD[None])
            return out.reshape(1, H * D)
        q_HTD = qk_TND[:, :H].transpose(0, 1)
        out = F.scaled_dot_product_attention(
            q_HTD[None],
            k_KSD[None],
            v_KSD[None],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1).reshape(t, H * D)

    def _mask(self, start: int, end: int) -> Tensor | None:
        """Which of S = end keys each new query sees, bool [T, S]; None: plain causal."""
        window = self.spec.window
        if end - start == 1 or (start == 0 and (window is None or end <= window)):
            return None
        mask = torch.ones(end - start, end, dtype=torch.bool).tril(start)
        return mask if window is None else mask.triu(start - window + 1)


def _sparse_attention(q: Tensor, k_KSD: Tensor, v_KSD: Tensor, sizes: SparseAttention) -> Tensor:
    """InfLLM v2 in PyTorch, by the tool that defines it; q and the result [1, H, T, D]."""
    from infllm2 import InfLLMv2Config, infllmv2_attention

    config = InfLLMv2Config(**{**asdict(sizes), "dense_len": -1})
    return infllmv2_attention(q, k_KSD[None], v_KSD[None], config, backend="reference")
