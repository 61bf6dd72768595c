"""First tokens alone through a model, a layer at a time: where `sinks` come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cpmcu import reference
from cpmcu._torch import torch
from cpmcu.rope import RopeTable
from cpmcu.sinks import Sinks
from cpmcu.tensors import Tensors, read_layer
from cpmcu.weights import Layer

F = torch.nn.functional

if TYPE_CHECKING:
    from torch import Tensor


class FirstToken(reference.Decoder):
    """The plain decoder over tokens at position 0, which see only themselves.

    Args:
        tensors: the model's own weights; one layer of them is in memory at a time.
    """

    def __init__(self, tensors: Tensors) -> None:
        self.spec, self._tensors = tensors.spec, tensors
        table = RopeTable(self.spec.rope, self.spec.head_dim, torch.float32)
        self._angles = table.rows(0, 1, length=1)

    @torch.inference_mode()
    def run(self, ids: Sequence[int]) -> tuple[Sinks, Tensor]:
        """Sinks of tokens, and what each layer reads of them and the last gives, float32
        [layers + 1, len(ids), hidden].
        """
        spec = self.spec
        rows = torch.empty(len(ids), spec.layers, 2, spec.kv_heads, spec.head_dim)
        hidden = torch.empty(spec.layers + 1, len(ids), spec.hidden)
        table = self._tensors.read("embed_tokens.weight")
        hidden[0] = table[torch.tensor(ids, dtype=torch.long)].float() * spec.embed_scale
        for i in range(spec.layers):
            layer = read_layer(spec, i, self._stacked, self._stacked)
            for token, x in enumerate(hidden[i]):
                arena = rows[token, i].unsqueeze(2)
                hidden[i + 1, token] = self._through(layer, x[None], arena)[0]
        return Sinks(tuple(ids), rows.numpy()), hidden

    def _stacked(self, *names: str) -> Tensor:
        return torch.cat([self._tensors.read(name).float() for name in names])

    def _through(self, layer: Layer, x: Tensor, arena: Tensor) -> Tensor:
        attended = self._attention(layer, x, arena, 0, *self._angles, None)
        x = torch.add(x, F.linear(attended, layer.output), alpha=self.spec.residual_scale)
        return torch.add(x, self._ffn(layer, x), alpha=self.spec.residual_scale)
