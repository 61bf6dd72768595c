"""apb on one GPU: its attention core against flash attention, virtual hosts against dense.

The mask of a later host is a staircase; the core makes it of flash calls that have no mask or are
causal, merged by their log-sum-exps. Its peer is one call without a mask on as many pairs of query
and key. The second row is the whole prefill of a random model of Llama-3.1-8B's shape: eight hosts
on one GPU, one after another, against the dense forward.

    python benchmarks/apb_gpu.py           # results/apb_gpu.<device>.json
    python benchmarks/apb_gpu.py --small   # the same rows on tiny sizes, CPU included; no file
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

import harness  # first: it keeps `import apb` from finding the benchmark
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import apb
from apb.costs import MODELS, ModelShape, costs
from apb.plan import Layer, Shape
from apb.registry import make_strategy

STRATEGY = make_strategy("apb", "key-norm")


@dataclass
class LastHost:
    """The last host, which passes nothing on and sees what all others passed, already here."""

    rank: int
    size: int
    passed: dict[int, Tensor]

    def exchange(self, sends: Any, receives: dict[int, tuple[int, ...]], like: Tensor) -> LastHost:
        """What was passed has arrived."""
        assert not sends and receives.keys() == self.passed.keys()
        return self

    def wait(self) -> dict[int, Tensor]:
        """By the host that passed it."""
        return self.passed


def last_layer(
    shape: ModelShape, tokens: int, hosts: int, device: str, dtype: torch.dtype
) -> Layer:
    """Random queries, keys and values of one layer on the last host."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

    plan = STRATEGY.plan(tokens, hosts, 0)
    rank = hosts - 1
    heads, dim = (shape.heads, shape.kv_heads, shape.kv_heads), shape.head_dim
    passed = {r: draw(2, 1, shape.kv_heads, plan.passing[r], dim) for r in range(rank)}
    qkv = tuple(draw(1, h, plan.rows(rank), dim) for h in heads)
    return Layer(0, LastHost(rank, hosts, passed), plan, qkv, dim**-0.5)


def masked(layer: Layer) -> Tensor:
    """The same by one softmax with the mask written out, in float32."""
    plan, rank = layer.plan, layer.host.rank
    anchor, rows = plan.anchors[rank], plan.rows(rank)
    passed = torch.cat([layer.host.passed[r] for r in range(rank)], 3)
    count = passed.shape[3]
    k, v = (torch.cat([p, x], 2).float() for p, x in zip(passed, (layer.k, layer.v), strict=True))
    seen = torch.ones(rows, count + rows, dtype=torch.bool, device=k.device).tril(count)
    seen[:anchor, :count] = False
    return scaled_dot_product_attention(layer.q.float(), k, v, attn_mask=seen, enable_gqa=True)


def core(
    shape: ModelShape, tokens: int, hosts: int, device: str, dtype: torch.dtype,
    bar: float | None = 0.8,
) -> harness.Case:  # fmt: skip
    """One layer's attention on the last host, the one with the most to see."""
    small = last_layer(shape, min(tokens, 1000), hosts, device, dtype)
    error = (STRATEGY.attend(small).float() - masked(small)).abs().max()
    assert error <= (0.02 if dtype == torch.bfloat16 else 1e-5), f"wrong by {error}"

    layer = last_layer(shape, tokens, hosts, device, dtype)
    rank, plan = hosts - 1, layer.plan
    pairs = STRATEGY.pairs(plan, rank, Shape(1, shape.heads, shape.kv_heads, shape.head_dim))
    rows = plan.local(rank)
    q = layer.q[:, :, :rows].contiguous()
    keys = round(pairs / rows)
    k, v = torch.randn(2, 1, shape.heads, keys, shape.head_dim, device=device, dtype=dtype)

    def sound(mine: Tensor, theirs: Tensor) -> None:
        assert mine.shape[2] == plan.rows(rank) and theirs.shape[2] == rows
        assert bool(mine.isfinite().all())

    return harness.Case(
        name=f"attention core, last of {hosts} hosts, {tokens // 1024}K tokens, "
        f"{shape.heads}/{shape.kv_heads} heads of {shape.head_dim}",
        unit="TFLOP/s",
        work=4 * shape.head_dim * shape.heads * pairs / 1e12,
        ours=lambda: STRATEGY.attend(layer),
        peer=lambda: scaled_dot_product_attention(q, k, v),
        peer_name="SDPA, no mask, equal pairs",
        check=sound,
        bar=bar,
    )


def random_llama(shape: ModelShape, positions: int, device: str, dtype: torch.dtype) -> Any:
    """A Llama of this shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, vocab_size=shape.vocabulary,
        max_position_embeddings=positions, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def whole(
    shape: ModelShape, tokens: int, hosts: int, device: str, dtype: torch.dtype
) -> harness.Case:
    """A prefill on virtual hosts, all their work, against the dense forward of the same model."""
    model = random_llama(shape, tokens + 8, device, dtype)
    ids = torch.randint(shape.vocabulary, (1, tokens), device=device)
    # Gate: passing everything without an anchor is the dense model, on a part of the document.
    part = ids[:, : min(tokens, 2048)]
    everything = make_strategy("apb", "key-norm", anchor_length=0, passing_length=len(part[0]))
    got = apb.prefill(model, part[:, :-1], strategy=everything, hosts=hosts).logits(part[:, -1:])
    with torch.no_grad():
        expected = model(part, logits_to_keep=1, use_cache=False).logits
    error = float((got.float() - expected.float()).norm() / expected.float().norm())
    assert error <= (0.05 if dtype == torch.bfloat16 else 1e-4), f"wrong by {error:.1%}"

    def peer() -> Any:
        with torch.no_grad():
            return model.base_model(input_ids=ids, use_cache=True).past_key_values

    def same_length(mine: apb.Context, theirs: Any) -> None:
        assert mine.length == theirs.get_seq_length() == tokens

    flops = {
        name: costs(make_strategy(*named), shape, tokens, hosts).flops
        for name, named in {"ours": ("apb", "key-norm"), "dense": ("dense",)}.items()
    }
    return harness.Case(
        name=f"all work, {tokens // 1024}K tokens, {hosts} virtual hosts, {shape.layers} layers",
        unit="tokens/s",
        work=tokens,
        ours=lambda: apb.prefill(model, ids, strategy=STRATEGY, hosts=hosts),
        peer=peer,
        peer_name="transformers' SDPA, dense",
        check=same_length,
        bound=flops["dense"] / flops["ours"],  # of the ratio: what counting operations gives
        bar=1.5,
        repeats=5,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes, any device, no file")
    arguments = parser.parse_args()
    if arguments.small:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tiny = ModelShape(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128,
                          vocabulary=256)  # fmt: skip
        for make in (core, whole):
            row = harness.measure(make(tiny, 2048, 4, device, torch.float32))
            print(f"{row['name']}: {row['ours']:,.3g} {row['unit']}, {row['ratio']:.2f}×")
        return
    if not torch.cuda.is_available():
        print("apb_gpu: no CUDA device here, nothing was measured")
        return
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    shape, tokens = MODELS["llama-3.1-8b"], 131072
    harness.main(
        f"apb_gpu.{name}",
        (make(shape, tokens, 8, "cuda", torch.bfloat16) for make in (core, whole)),
        measure=lambda case: harness.measure(case, cuda_wall),
    )


def cuda_wall(call: Any) -> float:
    """Seconds of one call, its kernels included."""

    def finished() -> None:
        call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return harness.wall_seconds(finished)


if __name__ == "__main__":
    main()
