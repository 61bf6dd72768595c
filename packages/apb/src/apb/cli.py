"""The `apb` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apb import _cli

app = typer.Typer(
    help="Prefill one long context on many hosts: APB (arXiv 2502.12085) and its relatives.",
    no_args_is_help=True,
    add_completion=False,
)

Strategies = Annotated[
    list[str] | None, typer.Option("--strategy", help="Repeat it. [all that fit]")
]
Anchor = Annotated[int | None, typer.Option(help="Anchor's document tokens. [block / 4]")]
Passing = Annotated[int | None, typer.Option(help="Tokens passed per KV head. [block / 8]")]


@app.command()
def explain(
    model: Annotated[str, typer.Option(help="A name, or a folder with config.json.")] = (
        "llama-3.1-8b"
    ),
    tokens: Annotated[int, typer.Option(help="Of the document.")] = 131072,
    hosts: Annotated[int, typer.Option(help="Hosts.")] = 8,
    query: Annotated[int, typer.Option(help="Tokens of the query in the anchor.")] = 0,
    network: Annotated[str, typer.Option(help="1gbe, 10gbe, 100g or nvlink.")] = "100g",
    tflops: Annotated[float, typer.Option(help="What one host reaches, TFLOP/s.")] = 200.0,
    bytes_per_value: Annotated[int, typer.Option(help="Bytes of one number.")] = 2,
    strategy: Strategies = None,
    anchor_length: Anchor = None,
    passing_length: Passing = None,
) -> None:
    """Operations, bytes on the wire, balance, memory and time of a prefill, by strategy.

    Closed forms; nothing is run. Times lie between sending wholly hidden behind computing and not
    hidden at all. The last line on standard output is the table as JSON, with every host's share.
    """
    import dataclasses
    import json

    from rich.console import Console
    from rich.table import Table

    from apb.costs import NETWORKS, costs, model_shape
    from apb.registry import STRATEGIES, make_strategy

    if network not in NETWORKS:
        raise ValueError(f"--network must be one of {', '.join(NETWORKS)}, got {network!r}")
    shape = model_shape(model)
    table = Table(
        "strategy", "PFLOP, all", "slowest host", "balance", "sent, most", "peak memory", "seconds"
    )
    rows = []
    for name in strategy or STRATEGIES:
        own = name in ("apb", "spava")
        made = make_strategy(
            name,
            "key-norm" if own else None,
            anchor_length=anchor_length if own else None,
            passing_length=passing_length if own else None,
        )
        c = costs(
            made, shape, tokens, hosts, query=query, bytes_per_value=bytes_per_value,
            network=NETWORKS[network], flops_per_second=tflops * 1e12,
        )  # fmt: skip
        busiest = max(h.linear_flops + h.attention_flops for h in c.hosts)
        sent = max(h.bytes_sent for h in c.hosts)
        peak = max(h.peak_bytes for h in c.hosts)
        table.add_row(
            name, f"{c.flops / 1e15:,.3g}", f"{busiest / 1e15:,.3g} PFLOP", f"{c.balance:.0%}",
            f"{sent / 2**30:,.3g} GiB", f"{peak / 2**30:,.3g} GiB",
            f"{c.overlapped_seconds:,.3g} – {c.serial_seconds:,.3g}",
        )  # fmt: skip
        facts = dataclasses.asdict(c)
        del facts["plan"]
        rows.append({"strategy": name, **facts})
    Console(stderr=True).print(table)
    print(json.dumps({"model": model, "tokens": tokens, "hosts": hosts, "rows": rows}))


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="Folder of a transformers decoder.")],
    samples: Annotated[Path, typer.Argument(help='JSONL: {"document": "…", "query": "…"}')],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL to write.")],
    strategy: Annotated[
        str, typer.Option(help="dense, ring, zigzag, ulysses, star, apb, spava.")
    ] = ("apb"),
    hosts: Annotated[int, typer.Option(help="Virtual hosts; under torchrun its processes.")] = 4,
    compressor: Annotated[
        str | None,
        typer.Option(
            help="query-attention, key-norm, key-difference, random, none, a locret folder."
        ),
    ] = None,
    query_in_anchor: Annotated[bool, typer.Option(help="Let the query choose what passes.")] = True,
    max_new_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 32,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Mass to sample from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    anchor_length: Anchor = None,
    passing_length: Passing = None,
) -> None:
    """Answer questions over long documents; one line out for each line in.

    Lines that the output already holds are skipped, so a killed run goes on. Started by torchrun,
    the processes are the hosts (gloo on CPUs, NCCL on GPUs) and the first writes the answers.
    """
    from apb.running import run_file

    run_file(
        model, samples, output, strategy=strategy, hosts=hosts, compressor=compressor,
        query_in_anchor=query_in_anchor, max_new_tokens=max_new_tokens, temperature=temperature,
        top_p=top_p, seed=seed, anchor_length=anchor_length, passing_length=passing_length,
    )  # fmt: skip


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(help="Folder of a transformers decoder.")],
    tokens: Annotated[int, typer.Option(help="Of a random document.")] = 4096,
    hosts: Annotated[int, typer.Option(help="Virtual hosts.")] = 4,
    network: Annotated[str, typer.Option(help="1gbe, 10gbe, 100g or nvlink.")] = "10gbe",
    repeats: Annotated[int, typer.Option(help="Runs of each; medians are shown.")] = 3,
    strategy: Strategies = None,
) -> None:
    """Time strategies on this machine: all of the work, and the critical path of such hosts.

    Hosts run one after another, each with all of this machine's threads; a clock for each host adds
    up its computing and the network's latency and bandwidth. The last line on standard output is
    the table as JSON.
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from apb.running import time_strategies

    table = Table("strategy", "all work", "critical path", "MB sent", "vs first")
    rows = time_strategies(model, tokens, hosts, network, repeats, strategy)
    for r in rows:
        table.add_row(
            r["strategy"], f"{r['seconds']:.3g} s", f"{r['critical_path']:.3g} s",
            f"{r['bytes_sent'] / 1e6:,.3g}",
            f"{rows[0]['critical_path'] / r['critical_path']:.2f}×",
        )  # fmt: skip
    Console(stderr=True).print(table)
    print(json.dumps({"tokens": tokens, "hosts": hosts, "network": network, "rows": rows}))


def main() -> None:
    """Entry point of the console script."""
    _cli.run(app)


if __name__ == "__main__":  # torchrun starts modules
    main()
