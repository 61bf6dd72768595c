"""A prefilled document: ask it any number of queries, sample answers, score given ones.

New tokens run on every host; each attends to the keys it owns, and the partial attentions are
merged by their log-sum-exps (Star attention's phase 2, arXiv 2411.17116). That is exact over the
keys that the prefill left. New keys stay on the last host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apb.checks import check_ids
from apb.interface import check_positions, exchanged, handled_by
from apb.merge import merge_lse
from apb.partial import merge_two, partial_attention
from apb.plan import Plan
from apb.transport import Group, Host

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from apb.engine import Report


class HostKV:
    """Keys and values of one host, by layer: the document's, and on the last host the new ones."""

    def __init__(self, rank: int, size: int, layers: int) -> None:
        self.rank, self.last = rank, size - 1
        self.document: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.new: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def keep(self, layer: int, k: Tensor, v: Tensor, anchor: int) -> None:
        """Store the document's rows of a layer; the anchor's are dropped."""
        rows = (k[:, :, anchor:], v[:, :, anchor:])
        self.document[layer] = (rows[0].clone(), rows[1].clone()) if anchor else rows

    def forget(self) -> None:
        """Drop what came after the document."""
        self.new = [None] * len(self.new)

    def attend(
        self, layer: int, host: Host, q: Tensor, k: Tensor, v: Tensor, scaling: float
    ) -> Tensor:
        """Attention of new rows q [B, Hq, M, D] over all hosts' keys; k, v: the rows' own."""
        stored = self.document[layer] or (k[:, :, :0], v[:, :, :0])
        out, lse = partial_attention(q, *stored, scaling=scaling)
        if self.rank == self.last:
            before = self.new[layer]
            if before is not None:
                out, lse = merge_two(out, lse, *partial_attention(q, *before, scaling=scaling))
                self.new[layer] = tuple(  # type: ignore[assignment]
                    torch.cat(pair, 2) for pair in zip(before, (k, v), strict=True)
                )
            else:
                self.new[layer] = (k, v)
            own = partial_attention(q, k, v, causal=True, scaling=scaling)
            out, lse = merge_two(out, lse, *own)
        return gather_and_merge(host, out, lse).to(q.dtype)


def gather_and_merge(host: Host, out: Tensor, lse: Tensor) -> Tensor:
    """Every host's partial attention, merged in the order of ranks, so that all get one result.

    out [B, Hq, M, D]; lse [B, Hq, M]. Returns [B, Hq, M, D], float32 or better.
    """
    if host.size == 1:
        return out
    # One message: the lse rides as one more column.
    packed = torch.cat([out.to(lse.dtype), lse.unsqueeze(-1)], -1)
    others = [rank for rank in range(host.size) if rank != host.rank]
    arrived = host.exchange(
        dict.fromkeys(others, packed), dict.fromkeys(others, tuple(packed.shape)), packed
    ).wait()
    arrived[host.rank] = packed
    parts = [arrived[rank] for rank in range(host.size)]
    return merge_lse([p[..., :-1] for p in parts], [p[..., -1] for p in parts])[0]


@dataclass
class Context:
    """A prefilled document.

    model, group, plan: as prefilled. kv: of this process's hosts, by rank. report: what it cost.
    length, batch: of the document.
    """

    model: PreTrainedModel
    group: Group
    plan: Plan
    kv: dict[int, HostKV]
    report: Report
    length: int
    batch: int

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of tokens [B, T] that follow the document; keeps nothing."""
        self._check(ids)

        def program(host: Host) -> Tensor:
            kv = self.kv[host.rank]
            kv.forget()
            try:
                return self._step(host, kv, ids, self.length)
            finally:
                kv.forget()

        with exchanged(self.model):
            return next(iter(self.group.run(program).values()))

    def generate(
        self,
        query: Tensor,
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: tuple[int, ...] = (),
    ) -> Tensor:
        """Answer a query [B, Q]: new ids [B, at most max_new_tokens], the stop id included.

        temperature: 0 is greedy. top_p: of the probability mass to sample from, in (0, 1].
        stop_ids: end a row; the first new token counts too. Rows that ended repeat their stop id.
        The last host samples and tells the others, so hosts never disagree. The context is as it
        was afterwards: ask the next query. Raises ValueError for values out of range.
        """
        self._check(query)
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(
                "expected max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1, got "
                f"{max_new_tokens}, {temperature}, {top_p}"
            )
        check_positions(self.model, self.length + query.shape[1] + max_new_tokens)

        def program(host: Host) -> Tensor:
            kv = self.kv[host.rank]
            kv.forget()
            generator = torch.Generator(query.device).manual_seed(seed)
            ids, position, answer = query, self.length, []
            ended = torch.zeros(self.batch, 1, dtype=torch.bool, device=query.device)
            stops = torch.tensor(stop_ids, dtype=torch.long, device=query.device)
            try:
                while len(answer) < max_new_tokens and not bool(ended.all()):
                    logits = self._step(host, kv, ids, position, last_only=True)[:, -1]
                    position += ids.shape[1]
                    token = _tell(host, sample(logits, temperature, top_p, generator))
                    ids = torch.where(ended, answer[-1], token) if answer else token
                    answer.append(ids)
                    ended = ended | torch.isin(ids, stops)
                return torch.cat(answer, 1)
            finally:
                kv.forget()

        with exchanged(self.model):
            return next(iter(self.group.run(program).values()))

    @torch.no_grad()
    def _step(
        self, host: Host, kv: HostKV, ids: Tensor, position: int, *, last_only: bool = False
    ) -> Tensor:
        def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, _: Any) -> Tensor:
            return kv.attend(module.layer_idx, host, q, k, v, scaling)

        positions = torch.arange(position, position + ids.shape[1], device=ids.device)[None]
        with handled_by(attend):
            return self.model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=1 if last_only else 0,
            ).logits

    def _check(self, ids: Tensor) -> None:
        check_ids("ids", ids, least=1)
        if ids.shape[0] != self.batch:
            raise ValueError(f"ids must have the document's batch of {self.batch}, got {len(ids)}")
        check_positions(self.model, self.length + ids.shape[1])


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """A token [B, 1] for each row of logits [B, vocabulary]; temperature 0 takes the largest."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        # A token stays while those before it do not fill top_p: the first always stays.
        outside = ordered.cumsum(-1) - ordered >= top_p
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered * ~outside)
    return torch.multinomial(probabilities, 1, generator=generator)


def _tell(host: Host, token: Tensor) -> Tensor:
    """The last host's token [B, 1], on every host."""
    last = host.size - 1
    if host.rank == last:
        host.exchange(dict.fromkeys(range(last), token), {}, token).wait()
        return token
    return host.exchange({}, {last: tuple(token.shape)}, token).wait()[last]
