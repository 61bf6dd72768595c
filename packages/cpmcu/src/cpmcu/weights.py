"""A model's weights in memory, fused so that one decoded token takes few matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cpmcu._torch import torch
from cpmcu.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

MATRICES = ("qkv", "output", "gate_up", "down")


@dataclass(slots=True)
class Layer:
    """One decoder layer's weights.

    `qkv` [(heads + 2 kv_heads) * head_dim, hidden] stacks queries, keys and values and `gate_up`
    [2 ffn, hidden] gate and up: same arithmetic, fewer and larger products. Matrices are
    tensors, or the codes of a quantised model, or what a file holds (`stored`), or laid out as a
    backend wants them; norms and biases are tensors or arrays.
    """

    attention_norm: Any
    qkv: Any
    output: Any
    ffn_norm: Any
    gate_up: Any
    down: Any
    qkv_bias: Any = None
    q_norm: Any = None
    k_norm: Any = None

    def mapped(self, matrix: Callable[[Any], Any], vector: Callable[[Any], Any]) -> Layer:
        """The layer with every matrix, and every norm and bias, put through a function."""
        parts = {name: getattr(self, name) for name in Layer.__slots__}
        return Layer(
            **{
                name: part if part is None else (matrix if name in MATRICES else vector)(part)
                for name, part in parts.items()
            }
        )


@dataclass(slots=True)
class Weights:
    """All weights. With tied embeddings `head` is the same memory as `embedding`.

    `layers` may be read only as they are taken (`tensors.load`). `slots`, of `allocate`, maps every
    transformers tensor name to the memory it belongs in.
    """

    embedding: Any
    layers: Iterable[Layer]
    norm: Any
    head: Any
    slots: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes held, a tied head counted once; where `layers` is a list."""
        tensors = [self.embedding, self.norm] + ([] if self.head is self.embedding else [self.head])
        tensors += [getattr(layer, name) for layer in self.layers for name in Layer.__slots__]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def allocate(spec: ModelSpec, dtype: torch.dtype) -> Weights:
    """Uninitialised weights of `spec` in `dtype`."""
    slots: dict[str, Tensor] = {}

    def stack(
        prefix: str, names: tuple[str, ...], shape: tuple[int, ...], rows: tuple[int, ...]
    ) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        for name, part in zip(names, tensor.split(rows), strict=True):
            slots[prefix + name] = part
        return tensor

    def single(name: str, *shape: int) -> Tensor:
        return stack(name, ("",), shape, shape[:1])

    h, q, kv = spec.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    layers = []
    for i in range(spec.layers):
        p = f"layers.{i}."
        names = tuple(f"self_attn.{n}_proj" for n in "qkv")
        weight, bias = (tuple(f"{n}.{kind}" for n in names) for kind in ("weight", "bias"))
        layer = Layer(
            attention_norm=single(p + "input_layernorm.weight", h),
            qkv=stack(p, weight, (spec.qkv_rows, h), (q, kv, kv)),
            output=single(p + "self_attn.o_proj.weight", h, q),
            ffn_norm=single(p + "post_attention_layernorm.weight", h),
            gate_up=stack(
                p,
                ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
                (2 * spec.ffn, h),
                (spec.ffn, spec.ffn),
            ),
            down=single(p + "mlp.down_proj.weight", h, spec.ffn),
        )
        if spec.qkv_bias:
            layer.qkv_bias = stack(p, bias, (spec.qkv_rows,), (q, kv, kv))
        if spec.qk_norm:
            layer.q_norm = single(p + "self_attn.q_norm.weight", spec.head_dim)
            layer.k_norm = single(p + "self_attn.k_norm.weight", spec.head_dim)
        layers.append(layer)
    embedding = single("embed_tokens.weight", spec.vocab, h)
    norm = single("norm.weight", h)
    head = embedding if spec.tie else single("lm_head.weight", spec.vocab, h)
    assert {n: tuple(t.shape) for n, t in slots.items()} == spec.tensors()
    return Weights(embedding, layers, norm, head, slots)
