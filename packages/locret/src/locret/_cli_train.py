"""`locret train`: from texts to a model's heads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from locret._cli_options import Answer, Data, Dtype, Length, Model, progress_bar


def train(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the heads.")],
    work: Annotated[
        Path | None,
        typer.Option(help="Folder of labels and finished layers.", show_default="OUTPUT/work"),
    ] = None,
    texts: Annotated[int, typer.Option(help="Windows to learn from and measure on.")] = 256,
    length: Length = 1024,
    answer: Answer = 128,
    facts: Annotated[
        float | None,
        typer.Option(
            help="Share of plain windows that get invented facts (English) and questions for them.",
            show_default="0.5; 0 with --query-aware",
        ),
    ] = None,
    repeats: Annotated[
        float | None,
        typer.Option(
            help="Share of plain windows whose first half is asked for again, word for word.",
            show_default="0.5; 0 with --query-aware",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help='The largest "attention" a key gets, or "scores" before the softmax, Eq. 3.',
            show_default="attention; scores with --query-aware",
        ),
    ] = None,
    hidden: Annotated[int, typer.Option(help="Width of a head; 0: ridge alone, minutes.")] = 256,
    input: Annotated[str, typer.Option(help='What heads read: "hidden" or "qkv".')] = "hidden",
    epochs: Annotated[int, typer.Option(help="Passes over the labels.")] = 4,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    loss: Annotated[
        str, typer.Option(help='"top" asks for the order of the best, "paper" is Eq. 5.')
    ] = "top",
    seed: Annotated[int, typer.Option(help="Same seed, same weights.")] = 0,
    query_aware: Annotated[
        bool,
        typer.Option(
            "--query-aware",
            help="Locret-Q: texts begin with what is asked of them. Lines of JSON "
            "need a question; of plain text, the answer's first tokens are it.",
        ),
    ] = False,
    dtype: Dtype = "bfloat16",
    keep: Annotated[
        bool, typer.Option(help="Keep the work folder: some 0.5 MB a text and layer.")
    ] = False,
) -> None:
    """Train a model's heads on text: labels, a ridge regression in one pass, then small MLPs.

    Every window's last tokens say which earlier keys they looked at most; the heads learn to
    foresee that from one token alone. So that they look at more than prose's next words do, plain
    windows get facts that are asked for, or are to be repeated.

    A killed run goes on where it was: run the same command. The last line on standard output is
    JSON: overlap with the truly best tenth on unseen windows.
    """
    from locret.data import examples, read_texts
    from locret.models import load_config, load_model
    from locret.training import TrainConfig, train

    labels = labels or ("scores" if query_aware else "attention")
    config = TrainConfig(
        hidden=hidden, input=input, labels=labels, epochs=epochs, lr=lr, loss=loss, seed=seed
    )
    load_config(model)
    found = [text for path in data for text in read_texts(path)]
    decoder, tokenizer = load_model(model, dtype)
    if facts is None:
        facts = 0.0 if query_aware else min(0.5, 1 - (repeats or 0.0))
    if repeats is None:
        repeats = 0.0 if query_aware else min(0.5, 1 - facts)
    windows = examples(
        found, tokenizer, length=length, answer=answer, count=texts, query_aware=query_aware,
        facts=facts, repeats=repeats,
    )  # fmt: skip
    work = work or output / "work"
    with progress_bar() as progress:
        heads, learnt = train(decoder, windows, config, work, progress)
    heads.save(output, **learnt)
    if not keep:
        shutil.rmtree(work)
    rows = ", ".join(f"{name} {value:.3f}" for name, value in learnt["overlap"].items())
    print(
        f"{output}: {learnt['tokens']:,} tokens; overlap with the best tenth, unseen text: {rows}"
    )
    print(json.dumps({"output": str(output), **learnt}))
