"""The `locret` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from locret import _cli
from locret._cli_look import explain, visualize
from locret._cli_options import (
    Answer,
    Budget,
    Budgets,
    Chunk,
    Data,
    Dtype,
    Heads,
    KeyDiff,
    Length,
    Local,
    Merge,
    Model,
    Positions,
    Scorer,
    Sinks,
    Stabilisers,
    Storage,
    chosen,
    progress_bar,
    reading,
    sized,
)
from locret._cli_train import train

app = typer.Typer(
    help="Locret: trained heads decide which keys a cache of fixed size keeps (arXiv 2410.01805). "
    "MODEL is the folder of a transformers decoder. Start with: locret train MODEL --data texts/ "
    "-o heads/",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(train)


@app.command("eval")
def evaluate(
    model: Model,
    data: Data,
    heads: Heads = None,
    scorer: Annotated[
        list[str] | None, typer.Option(help="To compare with; repeat it. [all but h2o]")
    ] = None,
    budget: Annotated[
        list[float] | None, typer.Option(help="Share of the prompt kept; repeat. [0.25, 0.125]")
    ] = None,
    texts: Annotated[int, typer.Option(help="Windows to measure on.")] = 8,
    length: Length = 1024,
    answer: Answer = 128,
    chunk: Chunk = 256,
    dtype: Dtype = "float32",
) -> None:
    """Compare heads with the training-free scorers on text that they have not seen.

    Overlap: how many of the tenth of entries that the window's end really looked at are among the
    tenth that the scorer likes best. NLL: nats per token of the window's end, read after the rest
    was compressed to a budget. The last line on standard output is JSON.
    """
    from rich.console import Console
    from rich.table import Table

    from locret.data import examples, read_texts
    from locret.evaluate import nll_by_budget, overlaps
    from locret.heads import RetainingHeads
    from locret.heads_and_keydiff import HeadsAndKeyDiff
    from locret.models import load_model
    from locret.scorers import SCORERS

    eyes: dict[str, Any] = {"heads": RetainingHeads.load(heads)} if heads else {}
    if heads:
        eyes["heads, keydiff"] = HeadsAndKeyDiff(eyes["heads"])
    for name in scorer or [n for n in SCORERS if n != "h2o"]:
        eyes[name] = chosen(None, name)
    found = [text for path in data for text in read_texts(path)]
    decoder, tokenizer = load_model(model, dtype)
    aware = bool(heads) and eyes["heads"].config.query_aware
    windows = examples(
        found, tokenizer, length=length, answer=answer, count=texts, query_aware=aware
    )
    shares = budget or [0.25, 0.125]
    with progress_bar() as progress:
        over = overlaps(decoder, eyes, windows, progress=lambda t, d: progress(t, d * 0.3))
        nll = nll_by_budget(
            decoder, eyes, windows, shares, chunk=chunk,
            progress=lambda t, d: progress(t, 0.3 + d * 0.7),
        )  # fmt: skip
    table = Table("", "overlap", *(f"NLL at {share:.1%}" for share in shares))
    for name in sorted(nll, key=lambda n: nll[n][-1]):
        best = f"{over[name]:.3f}" if name in over else "1"
        table.add_row(name, best, *(f"{value:.4f}" for value in nll[name]))
    Console().print(table)
    print(json.dumps({"budgets": shares, "overlap": over, "nll": nll, "texts": len(windows)}))


@app.command()
def generate(
    model: Model,
    prompt_file: Annotated[Path, typer.Option(help="Text that is read and compressed.")],
    question: Annotated[
        list[str] | None, typer.Option(help="Asked of the compressed text; repeat it.")
    ] = None,
    heads: Heads = None,
    scorer: Scorer = "snapkv",
    keydiff: KeyDiff = 0.0,
    new: Annotated[int, typer.Option(help="Most new tokens.")] = 64,
    budget: Budget = 1024,
    chunk: Chunk = 512,
    stabilisers: Stabilisers = None,
    sinks: Sinks = 4,
    local: Local = 100,
    positions: Positions = "contiguous",
    storage: Storage = "model",
    budgets: Budgets = "uniform",
    merge: Merge = None,
    dtype: Dtype = "float32",
) -> None:
    """Continue a long text, or answer questions about it, within budget + chunk entries a head.

    The text is read once; every question is asked of a copy of what is left of it. Query-aware
    heads read it anew for every question, which also stands before it.
    """
    import sys

    import torch

    from locret.generation import generate, prefill, query_first
    from locret.models import load_model, read_prompt

    eye = chosen(heads, scorer, keydiff)
    config = sized(
        budget, chunk, stabilisers, sinks, local, positions=positions, storage=storage,
        budgets=budgets, merge=merge,
    )  # fmt: skip
    decoder, tokenizer = load_model(model, dtype)
    ids = read_prompt(prompt_file, tokenizer, None).to(decoder.device)
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False}
    if not question:
        with reading(ids) as progress:
            out = generate(decoder, eye, ids, config, progress=progress, **options)
        print(tokenizer.decode(out[0], skip_special_tokens=True))
        return
    if getattr(getattr(getattr(eye, "heads", eye), "config", None), "query_aware", False):
        for asked in question:
            more = tokenizer(asked, return_tensors="pt", add_special_tokens=False)["input_ids"]
            more = more.to(decoder.device)
            text, sizes = query_first(more, ids, config)
            whole = torch.cat([text, more], 1)
            with reading(whole) as progress:
                out = generate(decoder, eye, whole, sizes, progress=progress, **options)
            print(f"{asked}{tokenizer.decode(out[0], skip_special_tokens=True)}")
        return
    with reading(ids) as progress:
        cache = prefill(decoder, eye, ids, config, progress=progress)
    print(f"{ids.shape[1]:,} tokens read, at most {cache.peak:,} entries held", file=sys.stderr)
    for asked in question:
        more = tokenizer(asked, return_tensors="pt", add_special_tokens=False)["input_ids"]
        out = generate(decoder, eye, more.to(decoder.device), config, cache=cache, **options)
        print(f"{asked}{tokenizer.decode(out[0], skip_special_tokens=True)}")


@app.command()
def bench(
    model: Model,
    tokens: Annotated[list[int] | None, typer.Option(help="Lengths; repeat it. [4096]")] = None,
    heads: Heads = None,
    scorer: Scorer = "keynorm",
    keydiff: KeyDiff = 0.0,
    repeats: Annotated[int, typer.Option(help="Pairs timed; medians are shown.")] = 3,
    budget: Budget = 1024,
    chunk: Chunk = 512,
    stabilisers: Stabilisers = None,
    sinks: Sinks = 4,
    local: Local = 100,
    storage: Storage = "model",
    budgets: Budgets = "uniform",
    merge: Merge = None,
    dtype: Dtype = "float32",
) -> None:
    """Time prefill and decoding, bounded against the model with its full cache, on this machine.

    The two take turns in one process. The last line on standard output is the table as JSON.
    """
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    from locret.models import load_model
    from locret.timing import measure

    eye = chosen(heads, scorer, keydiff)
    config = sized(
        budget, chunk, stabilisers, sinks, local, storage=storage, budgets=budgets, merge=merge
    )
    decoder, _ = load_model(model, dtype)
    table = Table("tokens", "prefill", "dense", "ratio", "decode", "dense", "cache", "dense")
    rows = []
    with progress_bar() as progress:
        lengths = tokens or [4096]
        for at, length in enumerate(lengths):
            progress(f"{length:,} tokens", at / len(lengths))
            r = measure(decoder, eye, length, config, repeats=repeats)
            rows.append(dataclasses.asdict(r))
            table.add_row(
                f"{length:,}", f"{r.prefill:.2f} s", f"{r.dense_prefill:.2f} s",
                f"{r.ratio:.2f}", f"{r.decode * 1e3:.1f} ms", f"{r.dense_decode * 1e3:.1f} ms",
                f"{r.kv_bytes / 1e6:.1f} MB", f"{r.dense_kv_bytes / 1e6:.1f} MB",
            )  # fmt: skip
    Console().print(table)
    print(json.dumps({"rows": rows}))


app.command()(explain)
app.command()(visualize)


def main() -> None:
    """Entry point of the console script."""
    _cli.run(app)
