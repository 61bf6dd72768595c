"""What an entry is worth: the trained heads, and the training-free scorers of other papers.

A scorer sees each call of a layer once, and gives every new entry a number. Those whose numbers
depend on what came later give all held entries new ones just before an eviction. They see what a
bounded cache sees; with a budget and chunk beyond the text they are the papers' one-shot methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from locret.heads import RetainingHeads
from locret.retaining_head import qkv_input
from locret.scoring import Scorer, Step, remember_queries, window_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from locret.layer_store import LayerStore


@dataclass
class Trained(Scorer):
    """Locret: the retaining heads (arXiv 2410.01805)."""

    heads: RetainingHeads

    def observe(self, step: Step) -> Tensor:
        """R(x) of each new token."""
        call = step.call
        if self.heads.config.input == "hidden":
            x = call.hidden
        else:
            q, k = call.unrotated()
            x = qkv_input(q, k, call.v[:, :, step.layer.held - step.new :])
        head = self.heads.layers[call.layer]
        return head(x.to(head.fc2.weight.dtype)).detach()

    def comparable(self, layer: LayerStore) -> Tensor:
        """Logs of the shares of attention: a score foretells a logit, before the softmax."""
        scores = layer.scores.float()
        if layer.valid is not None:
            scores = scores.masked_fill(~layer.valid, -torch.inf)
        return scores.log_softmax(-1)


@dataclass
class StreamingLLM(Scorer):
    """The first tokens and the newest (arXiv 2309.17453)."""

    sinks: int = 4

    def observe(self, step: Step) -> Tensor:
        """The position; of the sinks, more than any."""
        p = step.new_positions
        return torch.where(p < self.sinks, 2**30 - p, p).float()


@dataclass
class KeyNorm(Scorer):
    """Small keys draw attention (arXiv 2406.11430)."""

    def observe(self, step: Step) -> Tensor:
        """−‖k‖ to 11 bits: RoPE's rounding must not decide between equal tokens, which so tie."""
        return -step.new_keys.float().norm(dim=-1).clamp(max=6e4).half().float()


@dataclass
class RandomScores(Scorer):
    """The control: each position's number is a hash of position, head, layer and seed."""

    seed: int = 0

    def observe(self, step: Step) -> Tensor:
        """Uniform in [0, 1), whatever the chunks and the padding."""
        x = step.new_positions
        heads = torch.arange(x.shape[1], device=x.device)[:, None]
        x = (x * 40503 + heads * 9176 + step.call.layer * 6364136 + self.seed * 1442695) % 2**31
        for shift in (16, 15, 16):
            x = ((x ^ (x >> shift)) * 73244475) % 2**31
        return x.float() / 2**31


@dataclass
class KeyDiff(Scorer):
    """Keys least like the mean of all (arXiv 2504.15364)."""

    def observe(self, step: Step) -> Tensor:
        """Nothing yet."""
        return torch.zeros(step.new_positions.shape, device=step.call.q.device)

    def rescore(self, layer: LayerStore) -> None:
        """−cos(k, mean of the unit keys held)."""
        unit = normalize(layer.all("key").float(), dim=-1)
        weight = entry_weights(layer, unit)
        mean = (unit * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)
        layer.scores[:] = -(unit * normalize(mean, dim=-1)).sum(-1)


@dataclass
class H2O(Scorer):
    """Attention received so far, summed over queries and the group's heads (arXiv 2306.14048)."""

    block: int = 64

    def observe(self, step: Step) -> Tensor:
        """Adds this call's attention to what is held; the rows of it are never all in memory."""
        call, held, new = step.call, step.layer.held, step.new
        b, j = call.k.shape[:2]
        mass = torch.zeros(b, j, held, device=call.q.device)
        valid = step.new_valid
        for start in range(0, new, self.block):
            part = slice(start, min(start + self.block, new))
            q = call.q[:, :, part].unflatten(1, (j, -1))
            logits = torch.einsum("bjgtd,bjnd->bjgtn", q, call.k).float() * call.scaling
            seen = step.seen(part).unsqueeze(2)
            weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
            if valid is not None:
                weights = weights * valid[:, None, None, part, None]
            mass += weights.sum((2, 3))
        step.layer.scores[:, :, : held - new] += mass[:, :, : held - new]
        return mass[:, :, held - new :]


@dataclass
class SnapKV(Scorer):
    """Attention of the last queries, pooled over neighbours (arXiv 2404.14469).

    Args:
        window: queries that look back, and entries that are kept with them.
        kernel: entries averaged, odd.
    """

    window: int = 64
    kernel: int = 5

    def observe(self, step: Step) -> Tensor:
        """Keeps the window's queries."""
        remember_queries(step, self.window)
        return torch.zeros(step.new_positions.shape, device=step.call.q.device)

    def rescore(self, layer: LayerStore) -> None:
        """Mean softmax weight over window and group, then pooled; the window itself stays."""
        weights = window_attention(layer, softmax=True)
        if weights is None:
            return
        pooled = torch.nn.functional.avg_pool1d(
            weights, self.kernel, stride=1, padding=self.kernel // 2, count_include_pad=False
        )
        positions = layer.positions
        real = positions if layer.valid is None else positions.masked_fill(~layer.valid, -1)
        newest = real.amax(-1, keepdim=True)
        layer.scores[:] = pooled.masked_fill(
            positions > newest - self.window, float(pooled.max()) + 1
        )


@dataclass
class ExpectedAttention(Scorer):
    """Attention that queries still to come would give, were they normal (arXiv 2510.00636).

    Args:
        future: positions after the text that queries are expected at.
        sinks: first tokens whose queries are left out of the statistics, and which are kept.
    """

    future: int = 512
    sinks: int = 4

    def observe(self, step: Step) -> Tensor:
        """Adds this call's queries, before RoPE, to the layer's mean and covariance."""
        q, _ = step.call.unrotated()
        use = (step.new_positions[:, :1] >= self.sinks).float()
        if step.new_valid is not None:
            use = use * step.new_valid[:, None]
        q = q.float() * use[..., None]
        state = step.layer.state
        sums = (use.sum(-1)[..., None], q.sum(2), torch.einsum("bhtd,bhte->bhde", q, q))
        for name, value in zip(("count", "sum", "outer"), sums, strict=True):
            state[name] = state[name] + value if name in state else value
        state["step"] = (step.rotation, step.call.module, step.call.scaling)
        return torch.zeros(step.new_positions.shape, device=step.call.q.device)

    def rescore(self, layer: LayerStore) -> None:
        """E[exp(q · k)] over the group, normalised, times ‖v‖."""
        from locret.interface import rotate

        state = layer.state
        rotation, module, scaling = state["step"]
        count = state["count"].clamp(min=1)
        mean = state["sum"] / count
        cov = state["outer"] / count[..., None] - mean[..., None] * mean[..., None, :]
        # RoPE is linear in (cos, sin), so its mean over positions is RoPE by their means.
        if layer.config.positions == "contiguous":
            start = torch.as_tensor(layer.counts(), device=mean.device).view(-1, 1)
        else:
            last = layer.positions
            if layer.valid is not None:
                last = last.masked_fill(~layer.valid, -1)
            start = last.amax((1, 2))[:, None] + 1
        at = start + torch.arange(self.future, device=mean.device)
        cos, sin = (x.float().mean(1, keepdim=True) for x in rotation(at))
        turn = lambda x: rotate(module, x, x, cos, sin)[0]  # noqa: E731 - rows [.., .., n, D]
        mean = turn(mean[:, :, None])[:, :, 0]
        cov = turn(turn(cov).transpose(-1, -2)).transpose(-1, -2)
        keys = layer.all("key").float()
        groups = mean.shape[1] // keys.shape[1]
        mean, cov = (x.unflatten(1, (-1, groups)) for x in (mean, cov))
        logits = torch.einsum("bjgd,bjnd->bjgn", mean, keys) * scaling
        spread = torch.einsum("bjgde,bjne->bjgnd", cov, keys)
        logits = logits + 0.5 * scaling**2 * (spread * keys[:, :, None]).sum(-1)
        if layer.valid is not None:
            logits = logits.masked_fill(~layer.valid[:, :, None], -torch.inf)
        # A row that has only padding so far has no weights.
        weights = (
            logits.softmax(-1).nan_to_num(0.0) if layer.valid is not None else logits.softmax(-1)
        )
        weights = weights.mean(2) * layer.all("value").float().norm(dim=-1)
        sinks = layer.positions < self.sinks
        layer.scores[:] = weights.masked_fill(sinks, float(weights.max()) + 1)


SCORERS: dict[str, type[Scorer]] = {
    "snapkv": SnapKV,
    "h2o": H2O,
    "streaming": StreamingLLM,
    "keynorm": KeyNorm,
    "keydiff": KeyDiff,
    "expected": ExpectedAttention,
    "random": RandomScores,
}


def as_scorer(heads: RetainingHeads | Scorer | str, model: PreTrainedModel) -> Scorer:
    """Heads checked against the model, a scorer as it is, or one by name.

    Raises:
        ValueError: heads of another model, or an unknown name.
    """
    if isinstance(heads, RetainingHeads):
        heads.check(model)
        return Trained(heads)
    if isinstance(heads, Scorer):
        trained = getattr(heads, "heads", None)
        if isinstance(trained, RetainingHeads):
            trained.check(model)
        return heads
    if heads not in SCORERS:
        raise ValueError(
            f"heads must be RetainingHeads, a Scorer or one of {', '.join(SCORERS)}, got {heads!r}"
        )
    return SCORERS[heads]()


def entry_weights(layer: LayerStore, like: Tensor) -> Tensor:
    """1 for entries, 0 for what is none, `[B, J, n, 1]` or its like, in the dtype of `like`."""
    if layer.valid is None:
        return torch.ones_like(like[..., :1])
    return layer.valid[..., None].to(like.dtype)
