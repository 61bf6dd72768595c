"""What rounding activations to 8 bits costs, product by product; weights stay float32.

The native engine rounds what a matrix is multiplied by to int8, 32 columns to a scale. Here the
reference engine does the same, in one kind of product at a time, and in other ways: smaller groups,
a zero point. Differences to float32 are paired over windows of WikiText-2; ± is the standard error.

    python experiments/activations.py --data FOLDER

FOLDER holds test.parquet (column "text").
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from quality import losses, text_of, windows_of
from torch import Tensor
from torch.nn import functional

import testbed
from cpmcu import Engine
from cpmcu._cli import run
from cpmcu._files import write_json

RESULTS = Path(__file__).parent / "results/activations.json"
app = typer.Typer(add_completion=False)


def rounded(x: Tensor, group: int = 32, zero_point: bool = False) -> Tensor:
    """x [..., n] on 8-bit grids of `group` columns: symmetric, or from least to largest."""
    parts = x.unflatten(-1, (-1, group))
    if not zero_point:
        scale = parts.abs().amax(-1, keepdim=True) / 127
        return (torch.where(scale == 0, 0.0, parts / scale).round() * scale).flatten(-2)
    low = parts.amin(-1, keepdim=True).clamp(max=0)
    high = parts.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    zero = (-low / scale).round()
    return (((parts / scale + zero).round().clamp(0, 255) - zero) * scale).flatten(-2)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder of WikiText-2's test.parquet.")],
    windows: Annotated[int, typer.Option(min=2)] = 10,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
) -> None:
    """SmolLM2-135M-Instruct in float32, activations rounded in one kind of product at a time."""
    model = testbed.smollm2_path()
    engine = Engine.from_pretrained(model, dtype="float32", backend="reference", max_context=length)
    texts = windows_of(model, text_of(data / "test.parquet"), windows, length)
    spec = engine.spec
    width = spec.heads * spec.head_dim
    shapes = {
        "q, k, v": (spec.qkv_rows, spec.hidden),
        "output": (spec.hidden, width),
        "gate, up": (2 * spec.ffn, spec.hidden),
        "down": (spec.hidden, spec.ffn),
        "head": (spec.vocab, spec.hidden),
    }
    ways: dict[str, tuple[Callable[[Tensor], bool], dict]] = {
        "all": (lambda w: True, {}),
        **{
            name: (lambda w, shape=shape: tuple(w.shape) == shape, {})
            for name, shape in shapes.items()
        },
        "all, groups of 16": (lambda w: True, {"group": 16}),
        "all, a zero point": (lambda w: True, {"zero_point": True}),
    }
    plain, exact = functional.linear, losses(engine, texts)
    rows = {}
    for name, (picked, how) in ways.items():

        def linear(x: Tensor, w: Tensor, b: Tensor | None = None, picked=picked, how=how) -> Tensor:
            return plain(rounded(x, **how) if picked(w) else x, w, b)

        functional.linear = linear  # the reference decoder's products, all of them
        try:
            found = losses(engine, texts)
        finally:
            functional.linear = plain
        gaps = [(a - b) / (length - 1) for a, b in zip(found, exact, strict=True)]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps))
        rows[name] = {
            "percent": round(100 * math.expm1(statistics.mean(gaps)), 3),
            "error": round(100 * error, 3),
        }
        print(
            f"| {name} | {rows[name]['percent']:+.2f} % ± {rows[name]['error']:.2f} |", flush=True
        )
    write_json(RESULTS, {"windows": windows, "length": length, "rows": rows})


if __name__ == "__main__":
    run(app)
