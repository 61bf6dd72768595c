"""The commands that do not run a model: plan, quantize and convert."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from cpmcu._cli_options import (
    KV,
    DType,
    Json,
    Limit,
    Model,
    Quant,
    Sparse,
    memory_limit_bytes,
    parse_bytes,
    print_table,
    size,
    working,
)

Out = Annotated[
    Path, typer.Option("--out", "-o", help="Folder (or file) to write.", show_default=False)
]


def plan(
    model: Model,
    context: Annotated[
        int | None, typer.Option(help="Tokens to plan for; default: the model's limit.")
    ] = None,
    dtype: DType = "auto",
    quant: Quant = "auto",
    sparse: Sparse = "auto",
    kv: KV = "auto",
    backend: Annotated[
        str,
        typer.Option(
            help="gpu plans for a GPU, with --memory-limit and --bandwidth also for one that is "
            "not here; auto: where there is one."
        ),
    ] = "auto",
    memory_limit: Limit = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(help="Memory bytes per second, as 35G; default: measured for half a second."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print what MODEL needs before loading it: bytes, longest context, bound on decoding speed.

    The bound is bandwidth / bytes read per token: no program can decode faster from memory.
    """
    from cpmcu import plan as planning

    made = planning.make(
        model,
        dtype=dtype,
        quant=quant,
        sparse=sparse,
        kv=kv,
        context=context,
        memory_limit=memory_limit_bytes(memory_limit),
        bandwidth=None if bandwidth is None else parse_bytes(bandwidth, "--bandwidth"),
        backend=backend,
    )
    if as_json:
        print(json.dumps(made.to_dict()))
        return
    rows = [
        (
            "architecture",
            f"{made.architecture}, {made.parameters / 1e6:.1f} M parameters, {made.kind}",
        ),
        ("files", size(made.file_bytes)),
        (f"weights in {made.quant}", size(made.weight_bytes)),
        (f"keys and values in {made.kv}, {made.context} tokens", size(made.kv_bytes)),
        ("  per token", size(made.kv_bytes_per_token)),
        ("activations", size(made.activation_bytes)),
        ("total", size(made.total_bytes)),
        ("memory limit" + (" of the GPU" if made.device == "gpu" else ""), size(made.memory_limit)),
        ("largest context that fits", f"{made.largest_context} of {made.model_context} tokens"),
        ("memory bandwidth", f"{made.bandwidth / 1e9:.1f} GB/s"),
        ("decode bound at this context", f"{made.decode_bound:.1f} tokens/s"),
    ]
    print_table(made.model, ("", ""), rows)
    if made.total_bytes > made.memory_limit:
        fix = (
            f"--context {made.largest_context}"
            if made.largest_context
            else "a smaller model or --quant int4"
        )
        print(f"does not fit: take {fix}")


def quantize(
    model: Model,
    out: Out,
    method: Annotated[
        str, typer.Option(help="rtn (round to nearest), gptq, or p-gptq (MiniCPM4's).")
    ] = "p-gptq",
    bits: Annotated[int, typer.Option(help="4 or 8; embedding and head have 8.")] = 4,
    group: Annotated[int, typer.Option(help="Columns to a scale: 32, 64 or 128.")] = 32,
    calib: Annotated[
        Path | None,
        typer.Option(help="Text for gptq and p-gptq: plain, or .jsonl with a field 'text'."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Pieces of the text.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens of a piece.")] = 1024,
    seed: Annotated[int, typer.Option(help="Draws the pieces.")] = 0,
    damp: Annotated[
        float, typer.Option(help="Part of the Hessian's mean diagonal that is added to it.")
    ] = 0.01,
    act_order: Annotated[
        bool, typer.Option("--act-order", help="Round columns of the largest inputs first.")
    ] = False,
    search: Annotated[
        bool | None,
        typer.Option(
            "--search/--no-search",
            help="Choose scales by their squared error, not by the largest weight; default: "
            "always but for rtn in 4 bits.",
        ),
    ] = None,
    skip: Annotated[
        int, typer.Option(help="First positions of every piece that p-gptq holds back.")
    ] = 4,
    prefix: Annotated[
        str,
        typer.Option(
            help="How: level (scaled down to the size of the others) or drop (left out, as in the "
            "paper)."
        ),
    ] = "level",
    sinks: Annotated[
        bool,
        typer.Option(
            help="Store the exact keys and values of the tokens that sequences begin with."
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Write MODEL with weights of 4 or 8 bits.

    Layer by layer, in the memory of one. Interrupted or killed, the same command goes on after the
    last finished layer. The result runs wherever MODEL does; docs/layout.md describes its files.
    """
    from cpmcu.quantise import PARTS, quantise

    start = time.perf_counter()
    with working("quantising") as progress:
        report = quantise(
            model, out, calib=calib, progress=progress, method=method, bits=bits, group=group,
            samples=samples, length=length, seed=seed, damp=damp, act_order=act_order,
            search=search, skip=skip, prefix=prefix, sinks=sinks,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    if as_json:
        print(json.dumps({**report.to_dict(), "out": str(out), "seconds": round(seconds, 1)}))
        return
    rows = []
    for part in PARTS:
        errors = [layer[part] for layer in report.errors]
        mean = sum(errors) / len(errors)
        worst = max(range(len(errors)), key=lambda i: errors[i])
        rows.append((part, f"{mean:.2%}", f"{errors[worst]:.2%}", worst))
    what = "layers' outputs" if report.options.calibrated else "weights"
    print_table(
        f"{out}: {method}, {bits} bits, groups of {group}, {size(report.bytes)}",
        ("matrix", f"error of the {what}, mean", "largest", "in layer"),
        rows,
    )
    print(f"{seconds:.0f} s. Try it: cpmcu generate {out} --prompt 'Once upon a time'")


def convert(
    model: Model,
    out: Out,
    kind: Annotated[
        str,
        typer.Option(
            "--type",
            help="Of the matrices: auto (as they are stored), F32, F16, BF16, Q8_0, Q4_0; for GGUF "
            "Q4_1 and TQ2_0 too.",
        ),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Write MODEL as a GGUF file (if OUT ends with .gguf) or as a folder.

    Codes of 4 and 8 bits, of `quantize` or of Q4_0 and Q8_0, are passed on bit for bit. What is
    rounded is said, with its error.
    """
    from cpmcu.convert import convert as write

    with working("converting") as progress:
        made = write(model, out, kind, progress)
    if as_json:
        print(json.dumps(made.to_dict()))
        return
    counts = ", ".join(f"{count} {name}" for name, count in sorted(made.kinds.items()))
    print(f"{made.path}: {size(made.bytes)}; tensors: {counts}")
    if made.errors:
        worst = max(made.errors, key=lambda name: made.errors[name])
        mean = sum(made.errors.values()) / len(made.errors)
        print(
            f"{len(made.errors)} tensors were rounded: relative error {mean:.2e} in the mean, "
            f"{made.errors[worst]:.2e} at most ({worst})"
        )
    else:
        print("nothing was rounded")
