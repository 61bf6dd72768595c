"""What a prefill costs, from closed forms: operations, bytes, memory, time, without running it.

The forms of pairs and bytes are the strategies' own, which the tests hold to what hosts really do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from apb.plan import Plan, Shape, Strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a decoder with gated feed-forward layers.

    layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary: counts.
    tied: input and output embeddings are one matrix.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    @property
    def layer_parameters(self) -> int:
        """Of one layer's matrices."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """Of all matrices."""
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + tables


MODELS = {
    "smollm2-135m": ModelShape(
        layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536,
        vocabulary=49152, tied=True,
    ),
    "minicpm4-8b": ModelShape(
        layers=32, hidden=4096, heads=32, kv_heads=2, head_dim=128, intermediate=16384,
        vocabulary=73448,
    ),
    "llama-3.1-8b": ModelShape(
        layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336,
        vocabulary=128256,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Network:
    """latency: of a message, seconds. bandwidth: bytes / second that a host sends."""

    latency: float
    bandwidth: float


# Nominal link rates; latencies are of the order that such links have.
NETWORKS = {
    "1gbe": Network(50e-6, 1e9 / 8),
    "10gbe": Network(30e-6, 10e9 / 8),
    "100g": Network(3e-6, 100e9 / 8),
    "nvlink": Network(2e-6, 300e9),
}


@dataclass(frozen=True, slots=True)
class HostCosts:
    """One host's share of a prefill.

    rows: computed. linear_flops, attention_flops: operations (a multiply-add is two).
    bytes_sent, messages: all layers. kv_bytes: kept. peak_bytes: weights, kept keys, and one
    layer's activations. seconds: compute alone. wire_seconds: sending alone.
    """

    rows: int
    linear_flops: float
    attention_flops: float
    bytes_sent: int
    messages: int
    kv_bytes: int
    peak_bytes: int
    seconds: float
    wire_seconds: float


@dataclass(frozen=True, slots=True)
class Costs:
    """All hosts, and what follows from them.

    flops: of all hosts. balance: mean over maximum of the hosts' operations, 1 is perfect.
    overlapped_seconds, serial_seconds: of the slowest host, if computing hides all of the sending,
    and if it hides none: the time lies between. Waiting for a slower host is not in it.
    """

    plan: Plan
    hosts: tuple[HostCosts, ...]
    flops: float
    balance: float
    overlapped_seconds: float
    serial_seconds: float


def costs(
    strategy: Strategy,
    model: ModelShape,
    document: int,
    hosts: int,
    *,
    query: int = 0,
    batch: int = 1,
    bytes_per_value: int = 2,
    network: Network = NETWORKS["100g"],
    flops_per_second: float = 200e12,
) -> Costs:
    """Costs of prefilling `document` tokens on `hosts` hosts.

    flops_per_second: what one host really reaches. Raises ValueError as `Strategy.plan` does, and
    for rates that are not positive.
    """
    if not flops_per_second > 0 or bytes_per_value < 1 or batch < 1:
        raise ValueError(
            "flops_per_second must be positive, bytes_per_value and batch at least 1, got "
            f"{flops_per_second}, {bytes_per_value}, {batch}"
        )
    plan = strategy.plan(document, hosts, query)
    shape = Shape(batch, model.heads, model.kv_heads, model.head_dim)
    found = [
        _host(strategy, plan, rank, model, shape, bytes_per_value, network, flops_per_second)
        for rank in range(hosts)
    ]
    work = [h.linear_flops + h.attention_flops for h in found]
    return Costs(
        plan=plan,
        hosts=tuple(found),
        flops=sum(work),
        balance=sum(work) / hosts / max(work),
        overlapped_seconds=max(max(h.seconds, h.wire_seconds) for h in found),
        serial_seconds=max(h.seconds + h.wire_seconds for h in found),
    )


def _host(
    strategy: Strategy,
    plan: Plan,
    rank: int,
    model: ModelShape,
    shape: Shape,
    size: int,
    network: Network,
    speed: float,
) -> HostCosts:
    rows = plan.rows(rank)
    linear = 2.0 * shape.batch * rows * model.layer_parameters * model.layers
    pairs = strategy.pairs(plan, rank, shape)
    attention = 4.0 * shape.batch * model.head_dim * model.heads * pairs * model.layers
    sent = strategy.values_sent(plan, rank, shape) * size * model.layers
    messages = strategy.messages_sent(plan, rank) * model.layers
    per_token = 2 * model.kv_heads * model.head_dim * size * shape.batch
    kv = plan.local(rank) * per_token * model.layers
    # One layer at its widest: residual, and the feed-forward's two halves; keys from elsewhere.
    wide = shape.batch * rows * size * (2 * model.hidden + 2 * model.intermediate)
    foreign = sum(plan.passing) * per_token
    return HostCosts(
        rows=rows,
        linear_flops=linear,
        attention_flops=attention,
        bytes_sent=sent,
        messages=messages,
        kv_bytes=kv,
        peak_bytes=model.parameters * size + kv + wide + foreign,
        seconds=(linear + attention) / speed,
        wire_seconds=messages * network.latency + sent / network.bandwidth,
    )


def model_shape(name: str) -> ModelShape:
    """A shape of `MODELS`, or of the config.json in a folder.

    Raises ValueError for a name that is neither, or a configuration without the numbers.
    """
    if name in MODELS:
        return MODELS[name]
    file = Path(name) / "config.json"
    if not file.exists():
        raise ValueError(
            f"model must be one of {', '.join(MODELS)}, or a folder with a config.json; "
            f"got {name!r}"
        )
    config = json.loads(file.read_text("utf-8"))
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return ModelShape(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
        )
    except KeyError as error:
        raise ValueError(
            f"{file} has no {error.args[0]}: expected a decoder's config.json"
        ) from None
