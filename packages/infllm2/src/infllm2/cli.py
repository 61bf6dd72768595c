"""The `infllm2` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infllm2 import _cli

app = typer.Typer(
    help="InfLLM v2: trainable block-sparse attention (arXiv 2509.24663).",
    no_args_is_help=True,
    add_completion=False,
)

Kernel = Annotated[int, typer.Option(help="Tokens averaged into one compressed key.")]
Stride = Annotated[int, typer.Option(help="Tokens between two compressed keys.")]
Block = Annotated[int, typer.Option(help="Tokens per block.")]
Init = Annotated[int, typer.Option(help="Blocks at the start that every token visits.")]
Window = Annotated[int, typer.Option(help="Local window in tokens, visited by every token.")]
TopK = Annotated[int, typer.Option(help="Blocks besides the window, the initial ones included.")]
Lse = Annotated[str, typer.Option(help='Normaliser of the scores: "approx" or "exact".')]


@app.command()
def selfcheck() -> None:
    """Which backends run on this machine, and how far each is from the reference.

    Every backend selects blocks and attends on random tensors, in prefill and decode; the table
    shows whether its sets are the reference's and its largest error. Exit code 1 if one is wrong.
    """
    from rich.console import Console
    from rich.table import Table

    from infllm2.selfcheck import check_backends

    table = Table(
        "backend", "dtype", "available", "same blocks", "max error", "tolerance", "result"
    )
    results = check_backends()
    for r in results:
        if not r.available:
            table.add_row(r.backend, r.dtype, "no: " + r.reason, "", "", "", "skipped")
            continue
        verdict = "ok" if r.ok else "WRONG"
        same = "yes" if r.same_blocks else "no"
        table.add_row(
            r.backend, r.dtype, "yes", same, f"{r.error:.1e}", f"{r.tolerance:.0e}", verdict
        )
    Console().print(table)
    if not all(r.ok for r in results if r.available):
        raise typer.Exit(1)


@app.command()
def explain(
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 131072,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Size of one head.")] = 128,
    bytes_per_value: Annotated[int, typer.Option(help="Bytes of one cached number.")] = 2,
    bandwidth: Annotated[float, typer.Option(help="Memory read, GB/s: adds expected times.")] = 0,
    compute: Annotated[float, typer.Option(help="Matrix product, GFLOP/s: the same.")] = 0,
    kernel_size: Kernel = 32,
    kernel_stride: Stride = 16,
    block_size: Block = 64,
    init_blocks: Init = 1,
    window_size: Window = 2048,
    topk: TopK = 64,
    lse: Lse = "approx",
) -> None:
    """Operations, bytes and memory of one attention layer, dense and sparse, and the speed-up they
    allow.

    The speed-ups are bounds: they suppose kernels equally good on both sides. The default is
    MiniCPM4-8B at 128K tokens.
    """
    from rich.console import Console
    from rich.table import Table

    from infllm2.config import InfLLMv2Config
    from infllm2.costs import costs

    config = InfLLMv2Config(
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        init_blocks=init_blocks,
        window_size=window_size,
        topk=topk,
        lse=lse,  # type: ignore[arg-type]  # checked by the configuration itself
    )
    if bandwidth < 0 or compute < 0:
        raise ValueError(
            f"--bandwidth and --compute must be positive, got {bandwidth:g} and {compute:g}"
        )
    c = costs(tokens, heads, kv_heads, head_dim, config, bytes_per_value=bytes_per_value)
    console = Console()
    console.print(
        f"{tokens:,} tokens, {heads}/{kv_heads} heads of {head_dim}; up to {config.budget} blocks "
        f"of {block_size} visited per token: {init_blocks} initial, {config.window_blocks} of the "
        f"window, {topk - init_blocks} chosen. One layer, one sequence.",
        highlight=False,
    )
    table = Table("", "dense", "sparse: attention", "selection", "dense / sparse")
    flops = (c.dense_flops, c.sparse_flops, c.score_flops)
    giga = [f"{x / 1e9:,.3g} GFLOP" for x in flops]
    table.add_row("prefill, operations", *giga, f"{c.prefill_speedup:.2f}×")
    read = (c.dense_decode_bytes, c.sparse_decode_bytes, c.score_decode_bytes)
    table.add_row(
        "decode, bytes read", *(f"{x / 1e6:,.3g} MB" for x in read), f"{c.decode_speedup:.2f}×"
    )
    if compute:
        table.add_row("prefill, expected", *(f"{x / compute / 1e9:,.3g} s" for x in flops), "")
    if bandwidth:
        table.add_row("decode, expected", *(f"{x / bandwidth / 1e6:,.3g} ms" for x in read), "")
    console.print(table)
    console.print(
        f"Memory: cache {c.cache_bytes / 1e6:,.4g} MB, compressed keys "
        f"{c.compressed_bytes / 1e6:,.3g} MB ({c.compressed_bytes / c.cache_bytes:.1%}); prefill "
        f"in one call takes {c.prefill_extra_bytes / 1e6:,.3g} MB beside inputs and output; "
        f"scores of all queries at once: {c.score_matrix_bytes / 1e6:,.4g} MB, which only the "
        "reference ever holds.",
        highlight=False,
    )


@app.command()
def bench(
    tokens: Annotated[list[int] | None, typer.Option(help="Lengths; repeat it. [8K, 32K]")] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="Key-value heads.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Size of one head.")] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    piece: Annotated[int, typer.Option(help="Tokens of a prefill call, the prompt's last.")] = 256,
    backend: Annotated[str, typer.Option(help="auto, cpu, triton, torch or reference.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Calls of each kind; medians are shown.")] = 7,
    window_size: Window = 2048,
    topk: TopK = 64,
    lse: Lse = "approx",
) -> None:
    """Time sparse and dense attention on this machine, and the length from which sparse pays.

    The last line on standard output is the table as JSON.
    """
    import dataclasses
    import json

    import torch
    from rich.console import Console
    from rich.table import Table

    from infllm2.bench import bench as measure
    from infllm2.config import InfLLMv2Config
    from infllm2.switch import dense_below

    kinds = {name: getattr(torch, name) for name in ("bfloat16", "float32", "float16")}
    if dtype not in kinds:
        raise ValueError(f"--dtype must be one of {', '.join(kinds)}, got {dtype!r}")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device must be cpu, or cuda where there is a GPU, got {device!r}")
    config = InfLLMv2Config(
        window_size=window_size,
        topk=topk,
        dense_len="auto",
        lse=lse,  # type: ignore[arg-type]  # checked by the configuration itself
    )
    table = Table("keys", "call", "selection", "sparse", "dense", "torch", "vs dense", "vs torch")
    console, rows = Console(stderr=True), []
    for length in tokens or [8192, 32768]:
        with console.status(f"{length:,} keys …"):
            for r in measure(
                length, heads, kv_heads, head_dim, config, dtype=kinds[dtype], device=device,
                piece=piece, backend=backend, repeats=repeats,
            ):  # fmt: skip
                rows.append({"tokens": length, **dataclasses.asdict(r)})
                table.add_row(
                    f"{length:,}", f"{r.kind}, {r.queries} queries",
                    *(f"{x * 1e3:,.3g} ms" for x in (r.selection, r.sparse, r.dense, r.torch)),
                    f"{r.dense / r.sparse:.2f}×", f"{r.torch / r.sparse:.2f}×",
                )  # fmt: skip
    with console.status("from which length on sparse attention pays …"):
        like = torch.empty(1, heads, 1, head_dim, dtype=kinds[dtype], device=device)
        keys = like[:, :kv_heads].expand(-1, -1, config.budget * config.block_size, -1)
        pays = dense_below(config, like, keys, backend)
    Console().print(table)
    print(f'dense_len="auto" switches at {pays:,} keys')
    print(json.dumps({"dense_len": pays, "rows": rows}))


@app.command()
def visualize(
    model: Annotated[Path, typer.Argument(help="Folder of a transformers decoder.")],
    prompt_file: Annotated[Path, typer.Option(help="Text whose tokens are the prompt.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file to write.")],
    layer: Annotated[int, typer.Option(help="Layer to draw; −1 is the last.")] = -1,
    max_tokens: Annotated[int, typer.Option(help="Cut the prompt after so many tokens.")] = 8192,
    kernel_size: Kernel = 32,
    kernel_stride: Stride = 16,
    block_size: Block = 64,
    init_blocks: Init = 1,
    window_size: Window = 512,
    topk: TopK = 16,
    lse: Lse = "approx",
) -> None:
    """Draw which blocks the tokens of a real prompt visit in one layer of a model.

    The window and top-k defaults are smaller than those MiniCPM4 was trained with, so that prompts
    of a few thousand tokens show a choice.
    """
    from rich.console import Console

    from infllm2.config import InfLLMv2Config
    from infllm2.visualise import draw_prompt

    config = InfLLMv2Config(
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        init_blocks=init_blocks,
        window_size=window_size,
        topk=topk,
        dense_len=-1,
        lse=lse,  # type: ignore[arg-type]  # checked by the configuration itself
    )
    console = Console(stderr=True)
    with console.status("reading the model and the prompt …"):
        summary = draw_prompt(
            model, prompt_file, output, config, layer=layer, max_tokens=max_tokens
        )
    print(
        f"{output}: layer {summary['layer']}, {summary['tokens']} tokens, "
        f"{summary['visited_share']:.1%} of the causal blocks visited"
    )


def main() -> None:
    """Entry point of the console script."""
    _cli.run(app)
