"""The `cpmcu` command: generate, chat, bench, selfcheck; `commands` has the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cpmcu import _cli, commands
from cpmcu._cli_options import (
    KV,
    Backend,
    ContextLimit,
    DType,
    Json,
    Limit,
    MinP,
    Model,
    Penalty,
    Quant,
    RepeatableStop,
    Seed,
    Sparse,
    Temperature,
    Threads,
    TopK,
    TopP,
    load,
    print_table,
    read_prompt,
    working,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run language models on this machine. MODEL is a folder with safetensors (a transformers "
    "model, one packed by bitcpm, or one that `quantize` made) or a .gguf file.",
)
app.command()(commands.plan)
app.command()(commands.quantize)
app.command()(commands.convert)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read the text to continue from this file.")
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            help='Answer the conversation in this JSON file: [{"role": ..., "content": ...}, ...].'
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="At most this many.")
    ] = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: RepeatableStop = None,
    dtype: DType = "auto",
    quant: Quant = "auto",
    sparse: Sparse = "auto",
    kv: KV = "auto",
    backend: Backend = "auto",
    threads: Threads = None,
    max_context: ContextLimit = None,
    memory_limit: Limit = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print the cost on standard error.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Continue a text, or answer a conversation, and stream it to standard output."""
    from cpmcu.results import Stream

    source = read_prompt(prompt, prompt_file, messages)
    engine = load(model, dtype, quant, sparse, kv, backend, threads, max_context, memory_limit)
    stream = engine.generate(
        **source,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        stream=True,
    )
    assert isinstance(stream, Stream)
    for piece in stream:
        if not as_json:
            print(piece, end="", flush=True)
    print(json.dumps(stream.result.to_dict(), ensure_ascii=False) if as_json else "")
    if stats:
        print(json.dumps(stream.result.stats.to_dict()), file=sys.stderr)


@app.command()
def chat(
    model: Model,
    system: Annotated[
        str | None, typer.Option(help="First message, to set the assistant's role.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Per answer.")
    ] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    dtype: DType = "auto",
    quant: Quant = "auto",
    sparse: Sparse = "auto",
    kv: KV = "auto",
    backend: Backend = "auto",
    threads: Threads = None,
    max_context: ContextLimit = None,
    memory_limit: Limit = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print each answer's cost after it.")
    ] = False,
) -> None:
    """Talk to a model, one line per turn; reads a pipe as well.

    /exit ends, /reset starts over, Ctrl-C stops the answer only.
    """
    from cpmcu import chat as conversation

    engine = load(model, dtype, quant, sparse, kv, backend, threads, max_context, memory_limit)
    conversation.run(
        engine,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stats=stats,
    )


@app.command()
def bench(
    model: Model,
    prompt_tokens: Annotated[
        str, typer.Option(help="Prompt lengths, separated by commas.")
    ] = "512,2048",
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after each prompt.")] = 32,
    repeats: Annotated[
        int, typer.Option(help="Timed runs of each length; the median is shown.")
    ] = 3,
    dtype: DType = "auto",
    quant: Quant = "auto",
    sparse: Sparse = "auto",
    kv: KV = "auto",
    backend: Backend = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure prefill and decode speed, in tokens per second."""
    from cpmcu import bench as timing
    from cpmcu import threads as thread_count

    try:
        lengths = [int(part) for part in prompt_tokens.split(",")]
    except ValueError:
        message = f"--prompt-tokens must be integers and commas, got '{prompt_tokens}'"
        raise ValueError(message) from None
    engine = load(model, dtype, quant, sparse, kv, backend, threads, None, None)
    with working("timing") as progress:
        rows = timing.run(
            engine, lengths, new_tokens=new_tokens, repeats=repeats, progress=progress
        )
    kind = engine.arithmetic
    if as_json:
        facts = {"model": model, "dtype": kind, "quant": engine.quant, "backend": engine.backend}
        facts |= {"threads": engine.threads or thread_count.default(), "place": engine.place}
        print(json.dumps(facts | {"rows": [r.to_dict() for r in rows]}))
        return
    print_table(
        f"{model}: {engine.quant} weights, {engine.backend}, {engine.place}, median of {repeats}",
        ("prompt tokens", "prefill tok/s", "decode tok/s"),
        [
            (
                r.prompt_tokens,
                f"{r.prefill_tokens_per_second:.0f}",
                f"{r.decode_tokens_per_second:.1f}",
            )
            for r in rows
        ],
    )


@app.command()
def selfcheck(as_json: Json = False) -> None:
    """Compare every backend with the plain fp32 computation; exit code 1 if one fails."""
    from cpmcu import selfcheck as checking

    checks = checking.run()
    if as_json:
        print(json.dumps([check.to_dict() for check in checks]))
    else:
        rows = [
            (
                c.backend,
                c.dtype,
                "yes" if c.available else "no",
                f"{c.error:.1e}" if c.available else "",
                f"{c.tolerance:.0e}",
                ": ".join(filter(None, (c.verdict, c.reason))),
            )
            for c in checks
        ]
        print_table(
            "cpmcu selfcheck", ("backend", "dtype", "available", "error", "limit", "verdict"), rows
        )
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    _cli.run(app)
