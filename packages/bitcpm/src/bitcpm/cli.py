"""The `bitcpm` command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from . import _cli

app = typer.Typer(
    help="Ternary models: look at them, pack them to 1.6 or 2 bits a weight, unpack them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    Path,
    typer.Argument(help="Model folder: config.json and safetensors files.", show_default=False),
]
Json = Annotated[
    bool, typer.Option("--json", help="End with the whole report as one line of JSON.")
]


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; yields the function that moves it."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _group(size: int | None) -> str:
    return {None: "none", -1: "whole rows"}.get(size, str(size))


@app.command()
def inspect(
    model: Model,
    every: Annotated[bool, typer.Option("--all", help="List every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Find which tensors are ternary and their group size, from the weights themselves.

    Exit code 0 whatever is found; values off the grid are listed.
    """
    from .inspect import inspect_checkpoint

    with _progress("inspecting") as progress:
        report = inspect_checkpoint(model, progress)
    ternary, damaged, full = (report.of_kind(k) for k in ("ternary", "damaged", "full"))
    for t in report.tensors if every else damaged:
        # Plain lines rather than a table: names are long, and lines can be searched.
        line = f"{t.name} {t.dtype} {'x'.join(map(str, t.shape))} {t.kind}"
        if t.kind != "full":
            line += f", group size {_group(t.group_size)}, zeros {t.zero_share:.1%}"
            line += f", off grid {t.off_grid_values}"
        if t.scale_min is not None:
            line += f", scales {t.scale_min:.3g} to {t.scale_max:.3g}"
        print(line)
    print(f"{model}: {'packed' if report.packed else 'not packed'}")
    print(f"ternary tensors: {len(ternary)}, damaged: {len(damaged)}, full precision: {len(full)}")
    print(f"group size: {_group(report.group_size)}")
    if ternary:
        weights = [t.shape[0] * t.shape[1] for t in ternary]
        zeros = sum(n * (t.zero_share or 0) for n, t in zip(weights, ternary, strict=True))
        print(f"zeros among {sum(weights):,} ternary weights: {zeros / sum(weights):.1%}")
    if as_json:
        print(json.dumps(report.to_dict()))


@app.command()
def pack(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    codec: Annotated[
        str, typer.Option(help="1.6bit (five weights a byte) or 2bit (four).")
    ] = "1.6bit",
    group_size: Annotated[
        int | None,
        typer.Option(help="Channels a scale, -1 for rows.", show_default="found in the data"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack a pseudo-quantised model: same weights bit for bit, in a fraction of the bytes."""
    from .config import TernaryConfig
    from .convert import pack_model

    config = None if group_size is None else TernaryConfig(group_size=group_size)
    with _progress("packing") as progress:
        report = pack_model(model, out, config, codec, progress)
    before, after = (sum(pair[i] for pair in report.tensors.values()) for i in (0, 1))
    print(f"{len(report.tensors)} ternary tensors in groups of {_group(report.group_size)}")
    print(f"their bytes: {before:,} to {after:,} ({before / after:.1f} times smaller)")
    print(f"whole model: {report.bytes_before:,} to {report.bytes_after:,} bytes, in {out}")
    if as_json:
        print(json.dumps(report.to_dict()))


@app.command()
def unpack(
    packed: Annotated[Path, typer.Argument(help="Folder made by pack.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
) -> None:
    """Write a packed model as a normal one again, which any library loads."""
    from .convert import unpack_model

    with _progress("unpacking") as progress:
        unpack_model(packed, out, progress)
    print(f"pseudo-quantised model in {out}")


@app.command()
def export(
    packed: Annotated[Path, typer.Argument(help="Folder made by pack.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="GGUF file to write.")],
    kind: Annotated[
        str, typer.Option("--type", help="TQ1_0, TQ2_0, or Q4_0, which holds groups of 32.")
    ] = "TQ2_0",
    allow_error: Annotated[
        bool, typer.Option(help="Accept scales that the type cannot hold; the error is printed.")
    ] = False,
) -> None:
    """Write a packed Llama or Qwen3 model as a GGUF file (without its tokenizer).

    Refuses where the type would change the weights, and says by how much.
    """
    from .gguf_export import export_gguf

    with _progress("exporting") as progress:
        report = export_gguf(packed, out, kind, allow_error, progress)
    print(f"{report.ternary} tensors in {kind}, {report.plain} others, {report.bytes:,} bytes")
    if report.error:
        print(f"warning: the type does not hold the weights: relative error {report.error:.3g}")
    else:
        print("the weights are exact")


@app.command()
def quantise(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    group_size: Annotated[int, typer.Option(help="Channels a scale, -1 for rows.")] = 128,
    as_json: Json = False,
) -> None:
    """Round a trained model to ternary without training, and measure the error.

    This destroys the model's quality: it is for measuring and for tests. Ternary models that
    work are trained as such (bitcpm.ternarize).
    """
    from .config import TernaryConfig
    from .ptq import quantise_model

    with _progress("quantising") as progress:
        report = quantise_model(model, out, TernaryConfig(group_size=group_size), progress)
    print(f"{len(report.tensors)} matrices quantised, {report.zero_share:.1%} zeros, in {out}")
    print(f"relative weight error ||W - Wq|| / ||W||: {report.error:.3f}")
    print(
        "warning: no training went into this model; expect it to produce nonsense (train with "
        "bitcpm.ternarize instead)"
    )
    if as_json:
        print(json.dumps(report.to_dict()))


@app.command()
def train(
    model: Model,
    texts: Annotated[list[Path], typer.Argument(help="UTF-8 text files.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; must not exist.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps of both stages.")] = 1000,
    group_size: Annotated[int, typer.Option(help="Channels a scale, -1 for rows.")] = 128,
    qat: Annotated[float, typer.Option(help="Share of the steps with ternary weights.")] = 0.4,
    lr: Annotated[float, typer.Option(help="Peak rate of the first stage.")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Warm-up steps of each stage.")] = 20,
    block: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 8,
    teacher: Annotated[
        Path | None, typer.Option(help="Model folder to distil from at the end of QAT.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the text.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model in two stages, full precision and then ternary, and write it ternary.

    Runs on one CPU or GPU, or under torchrun or accelerate launch. Interrupted, the same command
    goes on from the last checkpoint, in OUT.training.
    """
    from .config import TernaryConfig, TwoStageConfig
    from .train import train_model
    from .trainer import leave_process_group

    schedule = TwoStageConfig(
        qat_fraction=qat,
        lr=lr,
        warmup_steps=warmup,
        rewarmup_steps=warmup,
        allow_short_qat=True,
        decay_fraction=min(0.2, qat / 2),
    )
    report = train_model(
        model, texts, out, steps=steps, ternary=TernaryConfig(group_size=group_size),
        two_stage=schedule, block=block, batch=batch, teacher_dir=teacher, seed=seed, bf16=bf16,
    )  # fmt: skip
    leave_process_group()
    print(f"{report.steps} steps, {report.qat_steps} of them ternary, {report.tokens:,} tokens")
    if report.first_loss is not None:
        print(f"loss {report.first_loss:.3f} to {report.last_loss:.3f}")
    print(f"zeros among the ternary weights: {report.zero_share:.1%}; model in {out}")
    if as_json:
        print(json.dumps(report.to_dict()))


@app.command()
def bench(
    out_features: Annotated[int, typer.Option("--out", help="Rows of the matrix.")] = 4096,
    in_features: Annotated[int, typer.Option("--in", help="Columns of the matrix.")] = 4096,
    group_size: Annotated[int, typer.Option(help="Channels a scale, -1 for rows.")] = 128,
    tokens: Annotated[int, typer.Option(help="1: decoding; 512: a prompt.")] = 1,
    megabytes: Annotated[
        int, typer.Option(help="Packed weights in all: more than the last cache, or less.")
    ] = 64,
    repeats: Annotated[int, typer.Option(help="Calls of each way.")] = 7,
    as_json: Json = False,
) -> None:
    """Time the packed products on this machine against PyTorch's bfloat16 product.

    Weights are random. "of bandwidth" is the share of what PyTorch's sum reads from memory.
    """
    from dataclasses import asdict

    import torch

    from .bench import bench as measure
    from .bench import read_bandwidth
    from .matrix import required_kernels

    level, bandwidth = required_kernels().level, read_bandwidth()
    print(f"level {level}, {torch.get_num_threads()} threads, memory {bandwidth / 1e9:.1f} GB/s")
    rows = list(
        measure(
            out_features,
            in_features,
            group_size=group_size,
            tokens=tokens,
            bytes_of_weights=megabytes << 20,
            repeats=repeats,
        )
    )
    dense = rows[-1].seconds
    print(
        f"{'way':<20} {'ms':>9} {'Gweights/s':>11} {'bits':>6} {'of bandwidth':>13} {'vs torch':>9}"
    )
    for row in rows:
        rate = row.weights * row.tokens / row.seconds / 1e9
        share = row.bytes / row.seconds / bandwidth
        print(
            f"{row.way:<20} {row.seconds * 1e3:>9.3f} {rate:>11.1f} {row.bits:>6.3f} "
            f"{share:>13.0%} {dense / row.seconds:>8.2f}x"
        )
    if as_json:
        print(
            json.dumps(
                {"level": level, "bandwidth": bandwidth, "rows": [asdict(row) for row in rows]}
            )
        )


@app.command()
def selfcheck() -> None:
    """Check that this installation quantises, packs, unpacks and multiplies exactly."""
    from .selfcheck import checks

    failed = 0
    for name, good in checks():
        print(f"{'ok  ' if good else 'FAIL'} {name}")
        failed += not good
    if failed:
        print(f"{failed} checks failed: please report them with your torch version")
        raise typer.Exit(1)
    print("all good")


def main() -> None:
    """Entry point of the console script."""
    _cli.run(app)
