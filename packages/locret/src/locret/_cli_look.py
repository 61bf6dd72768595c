"""`locret explain` and `locret visualize`: what a configuration costs, and what it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from locret._cli_options import (
    Budget,
    Budgets,
    Chunk,
    Dtype,
    Heads,
    KeyDiff,
    Local,
    Merge,
    Model,
    Scorer,
    Sinks,
    Stabilisers,
    Storage,
    chosen,
    sized,
)


def explain(
    model: Model,
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 131072,
    hidden: Annotated[int, typer.Option(help="Width of the heads.")] = 256,
    input: Annotated[str, typer.Option(help='What heads read: "hidden" or "qkv".')] = "hidden",
    bytes_per_value: Annotated[int, typer.Option(help="Bytes of one cached number.")] = 2,
    budget: Budget = 6000,
    chunk: Chunk = 3072,
    stabilisers: Stabilisers = None,
    sinks: Sinks = 0,
    local: Local = 100,
    storage: Storage = "model",
    budgets: Budgets = "uniform",
    merge: Merge = None,
) -> None:
    """Memory and operations of one prompt, bounded and with the full cache; reads no weights.

    MODEL needs no more than its config.json. The speed-up is a bound: it supposes kernels equally
    good on both sides.
    """
    from rich.console import Console
    from rich.table import Table

    from locret.costs import Shape, costs
    from locret.models import load_config

    config = sized(
        budget, chunk, stabilisers, sinks, local, storage=storage, budgets=budgets, merge=merge
    )
    shape = Shape.of(load_config(model))
    c = costs(shape, tokens, config, hidden=hidden, input=input, bytes_per_value=bytes_per_value)
    table = Table(f"{tokens:,} tokens", "full cache", "bounded", "full / bounded")

    def row(name: str, full: float, ours: float, unit: float, suffix: str) -> None:
        ratio = f"{full / ours:.2f}×" if ours else ""
        table.add_row(name, f"{full / unit:,.4g} {suffix}", f"{ours / unit:,.4g} {suffix}", ratio)

    row("keys and values, most held", c.full_bytes, c.held_bytes, 1e6, "MB")
    row("prefill, attention", c.full_attention_flops, c.attention_flops, 1e9, "GFLOP")
    row("prefill, rest of the model", c.linear_flops, c.linear_flops, 1e9, "GFLOP")
    row("prefill, heads", 0, c.head_flops, 1e9, "GFLOP")
    Console().print(table)
    print(
        f"At most {config.capacity:,} entries a head (budget {budget:,} + chunk {chunk:,})"
        + (f" in the mean, none above {config.ceiling + chunk:,}" * (budgets != "uniform"))
        + ", in "
        f"{c.chunks:,} calls; their scores and positions: {c.note_bytes / 1e6:,.3g} MB; heads: "
        f"{c.head_parameters / 1e6:,.3g} M parameters. Prefill: up to {c.prefill_speedup:.2f}×."
    )


def visualize(
    model: Model,
    prompt_file: Annotated[Path, typer.Option(help="Text whose tokens are the prompt.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG or SVG file to write.")],
    heads: Heads = None,
    scorer: Scorer = "snapkv",
    keydiff: KeyDiff = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Cut the prompt after so many tokens.")] = 8192,
    bins: Annotated[int, typer.Option(help="Parts of the prompt that are told apart.")] = 128,
    budget: Budget = 512,
    chunk: Chunk = 256,
    stabilisers: Stabilisers = None,
    sinks: Sinks = 4,
    local: Local = 16,
    budgets: Budgets = "uniform",
    dtype: Dtype = "float32",
) -> None:
    """Draw what was kept of a real prompt: its tokens to the right, layers and heads downwards."""
    from locret.generation import prefill
    from locret.models import load_model, read_prompt
    from locret.visualise import check_output, kept_map, plot_kept, save

    check_output(output)
    eye = chosen(heads, scorer, keydiff)
    config = sized(budget, chunk, stabilisers, sinks, local, budgets=budgets)
    decoder, tokenizer = load_model(model, dtype)
    ids = read_prompt(prompt_file, tokenizer, max_tokens).to(decoder.device)
    kept = prefill(decoder, eye, ids, config).kept()
    n = ids.shape[1]
    share = kept_map(kept, n, bins)
    by = "trained heads" if heads else scorer
    mean = round(sum((x >= 0).float().sum(2).mean().item() for x in kept) / len(kept))
    each = "each head" if budgets == "uniform" else f"a head in the mean, budgets by {budgets}"
    title = f"{by}: {mean:,} of {n:,} tokens kept by {each}"
    save(plot_kept(share, kept[0].shape[1], n, title=title), output)
    print(f"{output}: {title}, {len(kept)} layers")
