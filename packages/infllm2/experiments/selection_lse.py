"""Selection with and without the LSE approximation (arXiv 2509.24663, section 3.3): time, choice.

Scores need a log-sum-exp over all visible kernels. "exact" takes it over the fine kernels, which is
a second pass of the same size; "approx" over kernels four times as wide, a quarter of the work.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from shared import HERE, QUICK, Cells, budget, capture, long_texts, table
from torch import Tensor

from infllm2 import InfLLMv2Config, select_blocks, sparse
from infllm2._cli import run

SHAPES = {"32/2 × 128": (32, 2, 128), "16/2 × 64": (16, 2, 64)}
REPEATS = {16384: 5, 32768: 5, 65536: 3, 131072: 1}
TEXTS = {"essays": 1, "wikipedia": 1}  # documents of each
BUDGETS = {"512 + 16": (512, 16), "512 + 8": (512, 8), "256 + 4": (256, 4)}

app = typer.Typer(add_completion=False)


def pair(shape: str, tokens: int, repeat: int) -> dict[str, float]:
    """Seconds of selecting for all queries of a random bfloat16 prompt, both ways in turn."""
    heads, kv_heads, dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(repeat)
    q, k = (
        torch.randn(1, h, tokens, dim, generator=generator, dtype=torch.float32).bfloat16()
        for h in (heads, kv_heads)
    )
    seconds = {}
    for lse in ("approx", "exact") if repeat % 2 == 0 else ("exact", "approx"):
        config = InfLLMv2Config(lse=lse, dense_len=-1)
        select_blocks(q[:, :, -64:], k, config)  # warm
        start = time.perf_counter()
        select_blocks(q, k, config)
        seconds[lse] = time.perf_counter() - start
    return seconds


def overlap(q: Tensor, k: Tensor, config: InfLLMv2Config) -> dict[str, float]:
    """How far both ways agree on the chosen blocks, over queries that had a choice.

    Returns:
        `shared`: mean share of the exact choice that the approximate one has too; `equal`: share of
        (query, key-value head) with one and the same set; `by_chance`: `shared` of two random
        choices.
    """
    sets = [
        select_blocks(q, k, replace(config, lse=lse)) for lse in ("approx", "exact")
    ]  # [1, K, T, n]
    T, S = q.shape[2], k.shape[2]
    own = torch.arange(S - T, S) // config.block_size
    count = -(-S // config.block_size)
    member = [
        torch.zeros(*s.shape[:3], count + 1, dtype=torch.bool).scatter_(
            -1, s.long().masked_fill(s < 0, count), True
        )[..., :count]
        for s in sets
    ]
    block = torch.arange(count)
    back = own[:, None] - block
    others = (block >= config.init_blocks) & (back >= config.window_blocks)
    choice = own + 1 > config.budget
    chosen = config.topk - config.init_blocks
    both = (member[0] & member[1] & others).sum(-1)[..., choice]
    candidates = others.sum(-1)[choice]
    return {
        "shared": (both / chosen).mean().item(),
        "equal": (both == chosen).float().mean().item(),
        "by_chance": (chosen / candidates).mean().item(),
    }


def real(model: Any, ids: Tensor) -> dict[str, list[dict[str, float]]]:
    """`overlap` of each layer by budget, on the queries and keys of a real text."""
    kept: list[tuple[Tensor, Tensor]] = []
    # A budget that covers the text: the queries and keys are those of the dense model.
    covering = budget(512, -(-ids.shape[1] // 64))
    with torch.no_grad(), sparse(model, covering, select=capture(kept)):
        model(ids, logits_to_keep=1)
    return {
        name: [overlap(q, k, budget(*sizes)) for q, k in kept] for name, sizes in BUDGETS.items()
    }


def noise(tokens: int) -> dict[str, float]:
    """`overlap` at the trained budget, last 512 queries, on random queries and keys."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 32, 512, 128, generator=generator)
    k = torch.randn(1, 2, tokens, 128, generator=generator)
    return overlap(q, k, InfLLMv2Config(dense_len=-1))


def plan(
    lengths: list[int], repeats: dict[int, int], tokens: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and computations of all cells."""
    loaded: list[Any] = []

    def on_text(corpus: str, at: int) -> Any:
        import testbed

        if not loaded:
            loaded.extend(testbed.smollm2())
        model, tokenizer = loaded
        return real(model, long_texts(corpus, "all", tokens, tokenizer)[at])

    for corpus, count in TEXTS.items():
        for at in range(count):
            yield f"text {corpus} {at}", lambda corpus=corpus, at=at: on_text(corpus, at)
    for length in lengths:
        yield f"noise {length}", lambda length=length: noise(length)
    for length in lengths:
        for shape in SHAPES:
            for repeat in range(repeats.get(length, 1)):
                name = f"time {shape} {length} {repeat}"
                yield name, lambda a=(shape, length, repeat): pair(*a)


def summary(cells: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    """Medians by shape and length; means over layers and texts by budget."""
    times = {}
    for shape in SHAPES:
        for length in lengths:
            found = [v for n, v in cells.items() if n.startswith(f"time {shape} {length} ")]
            times[f"{shape}, {length}"] = {
                **{w: statistics.median(p[w] for p in found) for w in ("approx", "exact")},
                "ratio": statistics.median(p["exact"] / p["approx"] for p in found),
                "pairs": len(found),
            }
    texts = [v for n, v in cells.items() if n.startswith("text ")]
    overlaps = {}
    for name in BUDGETS:
        layers = [layer for text in texts for layer in text[name]]
        means = {w: statistics.mean(x[w] for x in layers) for w in layers[0]}
        overlaps[name] = {**means, "worst_layer": min(x["shared"] for x in layers)}
    return {"seconds": times, "overlap": overlaps}


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="Smoke run: tiny sizes, to runs/.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Holds results/ and figures/; beside this script.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Start nothing later than this; run again to go on.")
    ] = 1e9,
) -> None:
    """Time of block selection at 16K to 128K tokens (random bfloat16 data, MiniCPM4's budget), and
    how far both ways choose the same blocks: on SmolLM2's queries and keys of 8K tokens of real
    text at three small budgets, and on noise. Finished cells are kept: a killed run goes on."""
    lengths, tokens, repeats = list(REPEATS), 8192, REPEATS
    if quick:
        lengths, tokens, repeats = [8192], 1600, {8192: 1}
    settings = {"lengths": lengths, "tokens": tokens, "repeats": repeats, "texts": TEXTS}
    cells = Cells("selection_lse", out or (QUICK if quick else HERE), settings, minutes)
    if not cells.fill(plan(lengths, repeats, tokens)):
        return
    facts = summary(cells.cells, lengths)
    cells.save(summary=facts)
    rows = [
        [name, f"{1e3 * r['approx']:,.0f}", f"{1e3 * r['exact']:,.0f}", f"{r['ratio']:.2f}×"]
        for name, r in facts["seconds"].items()
    ]
    print(table(["heads × size, tokens", "approx, ms", "exact, ms", "exact ÷ approx"], rows))
    rows = [
        [name, *(f"{100 * r[w]:.1f} %" for w in ("shared", "equal", "by_chance", "worst_layer"))]
        for name, r in facts["overlap"].items()
    ]
    print(table(["budget", "shared", "sets equal", "by chance", "worst layer, shared"], rows))


if __name__ == "__main__":
    run(app)
