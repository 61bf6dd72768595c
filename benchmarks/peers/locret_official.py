"""A straightforward port of how the released Locret makes labels and trains, for SmolLM2.

As there: labels from each layer's whole score matrix in float32; then for every step the frozen
model reads the text again with eager attention, and all heads learn together from [Q, K, V] before
RoPE with AdamW and clipped values. Written from the description; none of its code is here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from locret import RetainingHeads, qkv_input, retaining_loss


class Loop:
    """The loop's two halves, one text at a time.

    Args:
        model: a Llama of transformers, float32.
        hidden: d_R.
    """

    def __init__(self, model: Any, hidden: int) -> None:
        self.model = model
        self.heads = RetainingHeads.for_model(model, hidden=hidden, input="qkv", bias=False)
        self.optimiser = torch.optim.AdamW(self.heads.parameters(), lr=5e-4, betas=(0.9, 0.95))

    def _run(self, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Each layer's projections `[1, H, T, D]` before RoPE, attention done eagerly."""
        found: list[list[Tensor]] = []
        hooks = []
        for block in self.model.model.layers:
            mine: list[Tensor] = []
            found.append(mine)
            attention = block.self_attn
            for name in ("q_proj", "k_proj", "v_proj"):
                hooks.append(getattr(attention, name).register_forward_hook(
                    lambda m, args, out, to=mine: to.append(out)
                ))  # fmt: skip
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                self.model(input_ids=ids, use_cache=False)
        finally:
            self.model.set_attn_implementation(before)
            for hook in hooks:
                hook.remove()
        size = self.model.model.layers[0].self_attn.head_dim
        split = lambda x: x.unflatten(-1, (-1, size)).transpose(1, 2)  # noqa: E731
        return [tuple(split(x) for x in layer) for layer in found]

    @torch.no_grad()
    def labels(self, ids: Tensor, answer: int) -> list[Tensor]:
        """By layer, `[1, J, n]`: the most that answer rows of the group's score matrices show."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        n = ids.shape[1] - answer
        at = torch.arange(ids.shape[1])[None]
        found = []
        for q, k, v in self._run(ids):
            cos, sin = self.model.model.rotary_emb(v, at)
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            group = q.shape[1] // k.shape[1]
            scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * q.shape[-1] ** -0.5
            best = scores[:, :, n:, :n].amax(2)
            found.append(best.unflatten(1, (-1, group)).amax(2))
        return found

    def step(self, ids: Tensor, labels: list[Tensor]) -> float:
        """One update of all heads."""
        n = labels[0].shape[-1]
        loss = torch.zeros(())
        for head, (q, k, v), truth in zip(self.heads.layers, self._run(ids), labels, strict=True):
            loss = loss + retaining_loss(head(qkv_input(q, k, v)[:, :n]), truth)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_value_(self.heads.parameters(), 0.5)
        self.optimiser.step()
        return loss.item()
