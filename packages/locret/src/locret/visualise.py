"""A picture of what was kept of a prompt, by layer and head. Only drawing needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from locret._files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")


def kept_map(kept: Sequence[Tensor], tokens: int, bins: int = 128) -> np.ndarray:
    """How much of each part of a prompt each head holds.

    Args:
        kept: by layer, int `[B, J, n]` positions, −1 for padding, as `LocretCache.kept()`; the
            first row is drawn.
        tokens: length of the prompt.
        bins: parts, at most one for each token.

    Returns:
        float64 `[layers · J, bins]`, shares 0 … 1 of the part's tokens; head j of layer l is row
        l · J + j.

    Raises:
        ValueError: positions beyond the prompt.
    """
    bins = min(bins, tokens)
    edges = np.linspace(0, tokens, bins + 1).round().astype(int)
    rows = []
    for layer in kept:
        for head in layer[0].cpu().numpy():
            if head.max(initial=-1) >= tokens:
                raise ValueError(f"position {head.max()} was kept of a prompt of {tokens} tokens")
            rows.append(np.histogram(head[head >= 0], bins=edges)[0] / np.diff(edges))
    return np.stack(rows).astype(float)


def plot_kept(share: np.ndarray, kv_heads: int, tokens: int, *, title: str = "") -> Figure:
    """Draw a map of `kept_map`: the prompt to the right, layers and their heads downwards.

    Returns:
        A matplotlib figure that belongs to no window; save it with `figure.savefig(path)`.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = figure_class()(figsize=(7.2, 5.4), layout="constrained")
    axes = figure.subplots()
    layers = share.shape[0] // kv_heads
    image = axes.imshow(
        share, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest",
        extent=(0, tokens, layers, 0),
    )  # fmt: skip
    axes.set_xlabel("position in the prompt (tokens)")
    axes.set_ylabel(f"layer ({kv_heads} key-value heads each)")
    axes.set_yticks(np.arange(0, layers + 1, max(1, layers // 10)))
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label="share of the tokens that is kept")
    return figure


def check_output(output: Path) -> None:
    """Refuse a picture that cannot be written, before anything slow.

    Raises:
        ValueError: neither .png nor .svg.
        FileNotFoundError: its folder does not exist.
        ImportError: matplotlib is missing.
    """
    if output.suffix[1:] not in FORMATS:
        raise ValueError(f"the picture must be .png or .svg, got {output.name}")
    if output.is_dir() or not output.parent.is_dir():
        raise FileNotFoundError(f"cannot write {output}: name a file in a folder that exists")
    figure_class()


def save(figure: Figure, output: Path) -> None:
    """Write a figure, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format=output.suffix[1:], dpi=150)
    with atomic_path(output) as path:
        path.write_bytes(picture.getvalue())


def figure_class() -> type[Figure]:
    """matplotlib's, without a window system."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    return Figure
