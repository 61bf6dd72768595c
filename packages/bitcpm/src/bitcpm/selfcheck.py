"""Does this installation compute what it should? A few seconds, no files but temporary ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from .config import TernaryConfig
from .cpu_library import kernels
from .format import load_packed, save_packed
from .group_size import fit_sizes
from .matrix import TernaryMatrix
from .packing import CODECS, PackedTensor
from .qat import TernaryLinear, fake_quantise, straight_through
from .recover import on_grid
from .reference import dequantise, quantise


def checks() -> Iterator[tuple[str, bool]]:
    """Each check's name, and whether it holds here."""
    random = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = torch.randn(48, 200, generator=random).to(dtype)
        short = str(dtype).removeprefix("torch.")
        for group_size in (64, -1):
            config = TernaryConfig(group_size=group_size)
            q = fake_quantise(w, config)
            same = torch.equal(q, dequantise(*quantise(w, config), config))
            yield f"{short}, g={group_size}: QAT forward equals the reference", same
            yield (
                f"{short}, g={group_size}: three values in a group",
                bool(on_grid(q, group_size).all()),
            )
            fits = fit_sizes(q).allows(group_size)
            yield f"{short}, g={group_size}: group size found in the data", fits
            for codec in CODECS:
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder) / "packed.safetensors"
                    save_packed(file, {"w": PackedTensor.from_weights(q, group_size, codec)}, {})
                    equal = torch.equal(load_packed(file)["w"], q)
                yield f"{short}, g={group_size}: packed in {codec}, written, read, equal", equal
    w = torch.randn(16, 64, generator=random, requires_grad=True)
    upstream = torch.randn(16, 64, generator=random)
    (grad,) = torch.autograd.grad(straight_through(w), w, upstream)
    yield "gradient passes unchanged", torch.equal(grad, upstream)
    layer = TernaryLinear(64, 16)
    plain = torch.nn.Linear(64, 16)
    yield "state dict is a plain layer's", layer.state_dict().keys() == plain.state_dict().keys()
    library, reason = kernels()
    if library is None:
        yield f"CPU kernels: not available, {reason}", True
        return
    for codec in CODECS:
        yield from _products(library.level, codec, random)


def _products(level: str, codec: str, random: torch.Generator) -> Iterator[tuple[str, bool]]:
    """Integer activations, which no rounding changes: each product is known exactly."""
    w = torch.randint(-1, 2, (150, 300), generator=random).float()
    matrix = TernaryMatrix.from_packed(PackedTensor.from_weights(w, 100, codec))
    for tokens in (1, 20):
        x = torch.randint(-126, 127, (tokens, 300), generator=random).float()
        x[:, ::100] = 127  # the largest of every group: a step is 1
        for mode in ("int8", "int8-group", "exact"):
            same = torch.equal(matrix.multiply(x, None, mode), x @ w.T)
            yield f"CPU kernels ({level}), {codec}, {mode}, {tokens} tokens: exact", same
