"""Prefill a document on several hosts with a transformers model.

Every host runs the model's own forward pass over its rows [anchor | blocks]; wherever a layer
attends, the strategy takes over. What is left is a `Context`: each host's keys and values, over
which any number of queries can be asked (`apb.context`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apb._attention import attention_modules
from apb.checks import check_ids
from apb.compressors import Compressor
from apb.context import Context, HostKV
from apb.interface import IMPLEMENTATION, check_positions, exchanged, handled_by
from apb.plan import Layer, Plan, Strategy
from apb.registry import make_strategy
from apb.transport import Group, Host
from apb.virtual import VirtualGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Report:
    """What the prefill cost the hosts of this process, by rank.

    bytes_sent, messages_sent: that left the host. pairs: pairs of query row and key, mean over
    query heads, all layers. rows: that the host computed, anchor included.
    """

    bytes_sent: dict[int, int] = field(default_factory=dict)
    messages_sent: dict[int, int] = field(default_factory=dict)
    pairs: dict[int, float] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)


def prefill(
    model: PreTrainedModel,
    document: Tensor,
    *,
    strategy: str | Strategy = "apb",
    hosts: int | Group = 4,
    query: Tensor | None = None,
    compressor: str | Compressor | None = None,
    progress: Callable[[float], None] = lambda share: None,
    **options: Any,
) -> Context:
    """Prefill `document` on all hosts of a group, and keep each host's keys and values there.

    model: a transformers decoder with full attention, in eval mode.
    document: int64 token ids [B, n], no padding. query: ids [B, Q] to put into the anchor, so that
        what is passed on fits the question; None prefills for any question.
    strategy: dense, ring, zigzag, ulysses, star, apb, spava, or an object. hosts: a number of
        virtual hosts, or a `VirtualGroup` or `DistributedGroup`.
    compressor: query-attention, key-norm, key-difference, random, none, or an object; None is
        query-attention with a query and key-norm without. options: anchor_length, passing_length,
        pool_kernel, sink.
    progress: called after every layer of this process's hosts with the share of them done.

    Anchor rows have positions 0, 1, ...; document tokens keep their own.
    Raises ValueError for what does not fit.
    """
    check_ids("document", document, least=1)
    group = VirtualGroup(hosts) if isinstance(hosts, int) else hosts
    if query is not None:
        check_ids("query", query, least=1)
        if query.shape[0] != document.shape[0]:
            raise ValueError(
                f"query and document must have one batch size, got {query.shape[0]} and "
                f"{document.shape[0]}"
            )
    if isinstance(strategy, str):
        strategy = make_strategy(strategy, compressor, with_query=query is not None, **options)
    elif compressor is not None or options:
        raise ValueError("compressor and options belong to a strategy given by name")
    count = 0 if query is None else query.shape[1]
    plan = strategy.plan(document.shape[1], group.size, count)
    check_positions(model, document.shape[1])
    check_model = getattr(getattr(strategy, "compressor", None), "check", None)
    if check_model is not None:
        check_model(model)
    layers = len(attention_modules(model, IMPLEMENTATION))
    report = Report()
    todo = layers * sum(plan.rows(rank) > 0 for rank in group.ranks)
    attended = 0

    def count_layer() -> None:
        nonlocal attended
        attended += 1
        progress(attended / todo)

    def program(host: Host) -> HostKV:
        kv = HostKV(host.rank, group.size, layers)
        ids, positions = host_rows(plan, host.rank, document, query)
        if ids.shape[1]:
            pairs = _forward(model, strategy, plan, host, kv, ids, positions, count_layer)
            report.pairs[host.rank] = pairs
        report.bytes_sent[host.rank] = host.bytes_sent
        report.messages_sent[host.rank] = host.messages_sent
        report.rows[host.rank] = ids.shape[1]
        return kv

    with exchanged(model, inputs=_reads_inputs(strategy)):
        kv = group.run(program)
    return Context(
        model=model, group=group, plan=plan, kv=kv, report=report,
        length=document.shape[1], batch=document.shape[0],
    )  # fmt: skip


def host_rows(
    plan: Plan, rank: int, document: Tensor, query: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Token ids [B, M] of a host's rows, and their positions [1, M]."""
    ids, positions = [document[:, :0]], []
    if plan.anchors[rank]:
        end = plan.document_anchor
        middle = [] if query is None else [query]
        ids += [document[:, : plan.sink], *middle, document[:, plan.sink : end]]
        positions.append(torch.arange(plan.anchors[rank]))
    for block in plan.blocks[rank]:
        ids.append(document[:, block.start : block.end])
        positions.append(torch.arange(block.start, block.end))
    row_positions = torch.cat(positions) if positions else torch.empty(0, dtype=torch.long)
    return torch.cat(ids, 1), row_positions[None].to(document.device)


@torch.no_grad()
def _forward(
    model: PreTrainedModel,
    strategy: Strategy,
    plan: Plan,
    host: Host,
    kv: HostKV,
    ids: Tensor,
    positions: Tensor,
    count_layer: Callable[[], None],
) -> float:
    pairs = 0.0

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, context: Any):
        nonlocal pairs
        layer = Layer(module.layer_idx, host, plan, (q, k, v), scaling, context)
        out = strategy.attend(layer)
        pairs += layer.pairs
        kv.keep(module.layer_idx, k, v, plan.anchors[host.rank])
        count_layer()
        return out

    with handled_by(attend):
        # Without a mask transformers takes positions that jump for several packed texts.
        everything = torch.ones_like(ids)
        model.base_model(
            input_ids=ids, attention_mask=everything, position_ids=positions, use_cache=False
        )
    return pairs


def _reads_inputs(strategy: Strategy) -> bool:
    return bool(getattr(getattr(strategy, "compressor", None), "reads_inputs", False))
