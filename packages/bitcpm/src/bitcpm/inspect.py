"""Which tensors of a checkpoint are ternary, and in groups of what size: found from the data."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .checkpoint import DTYPES, Checkpoint
from .format import PackedFile, is_packed
from .group_size import Fit, common_size, fit_sizes
from .recover import SMALLEST_EVIDENCE, looks_ternary, off_grid_values, on_grid
from .reference import split_groups

Kind = Literal["ternary", "damaged", "full"]
Progress = Callable[[int, int], None]

# Above this share of groups on the grid a tensor was ternary once: of dense weights nearly none
# are.
DAMAGED_SHARE = 0.5
USUAL_SIZES = (-1, 256, 128, 64, 32)


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor.

    Attributes:
        name: as in the model.
        shape: of the model's tensor, packed or not.
        dtype: safetensors' name of it, "BF16" for instance.
        kind: "ternary"; "damaged" if most groups are ternary but not all; "full" otherwise.
        group_size: ternary: the largest that fits this tensor alone (packed: the one it is stored
            with); damaged: the one that `off_grid_values` counts in; -1: whole rows.
        zero_share: share of zeros among its weights; None if it is full.
        off_grid_values: weights that are neither 0 nor as large as their group's largest.
        scale_min: smallest scale of a group that is not all zero; None if there is none.
        scale_max: largest such scale.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind = "full"
    group_size: int | None = None
    zero_share: float | None = None
    off_grid_values: int = 0
    scale_min: float | None = None
    scale_max: float | None = None


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """A checkpoint.

    Attributes:
        path: the folder or file.
        packed: whether it is in bitcpm's packed format.
        group_size: the largest that fits all ternary tensors (-1: whole rows); None if there is no
            ternary tensor, or no common size.
        tensors: in name order.
    """

    path: str
    packed: bool
    group_size: int | None
    tensors: tuple[TensorReport, ...]

    def of_kind(self, kind: Kind) -> list[TensorReport]:
        """The tensors of one kind."""
        return [t for t in self.tensors if t.kind == kind]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return asdict(self)


def inspect_checkpoint(
    path: str | os.PathLike[str], progress: Progress | None = None
) -> CheckpointReport:
    """Find the ternary tensors and their group size, in a pseudo-quantised or a packed checkpoint.

    Args:
        path: a model folder with safetensors files, or one such file.
        progress: called with (tensors done, tensors in all).

    Raises:
        FileNotFoundError: there is no safetensors file.
        ValueError: a file is damaged.
    """
    with Checkpoint(path) as checkpoint:
        if not is_packed(checkpoint):
            return _inspect_plain(checkpoint, progress)
    with PackedFile(path) as file:
        return _inspect_packed(file, str(path), progress)


def _inspect_plain(checkpoint: Checkpoint, progress: Progress | None) -> CheckpointReport:
    names = checkpoint.names()
    reports: dict[str, TensorReport] = {}
    fits: list[Fit] = []
    damaged: list[str] = []
    for done, name in enumerate(names, 1):
        report = TensorReport(name, checkpoint.shape(name), checkpoint.dtype(name))
        if is_candidate(report.shape, report.dtype):
            w = checkpoint.tensor(name)
            if looks_ternary(w):
                fits.append(fit_sizes(w))
                report = _measured(report, w, "ternary", fits[-1].largest())
            # A look at some rows first: a large dense matrix is then done.
            elif _share(w[:256], SMALLEST_EVIDENCE) >= DAMAGED_SHARE:
                damaged.append(name)
        reports[name] = report
        if progress:
            progress(done, len(names))
    common = common_size(fits)
    for name in damaged:
        w = checkpoint.tensor(name)
        sizes = USUAL_SIZES if common is None else (common,)
        size = next((g for g in sizes if _share(w, g) >= DAMAGED_SHARE), None)
        if size is not None:
            reports[name] = _measured(reports[name], w, "damaged", size)
    return CheckpointReport(str(checkpoint.path), False, common, tuple(reports.values()))


def _inspect_packed(file: PackedFile, path: str, progress: Progress | None) -> CheckpointReport:
    names = file.names()
    reports = []
    for done, name in enumerate(names, 1):
        if name in file.entries:
            entry = file.entries[name]
            report = TensorReport(name, entry.shape, entry.dtype)
            reports.append(_measured(report, file.tensor(name), "ternary", entry.group_size))
        else:
            reports.append(TensorReport(name, file.plain_shape(name), file.plain_dtype(name)))
        if progress:
            progress(done, len(names))
    sizes = {entry.group_size for entry in file.entries.values()}
    return CheckpointReport(path, True, sizes.pop() if len(sizes) == 1 else None, tuple(reports))


def is_candidate(shape: tuple[int, ...], dtype: str) -> bool:
    """Whether a tensor can be ternary at all: a float matrix with rows of 8 or more."""
    return len(shape) == 2 and dtype in DTYPES and shape[0] > 0 and shape[1] >= SMALLEST_EVIDENCE


def _share(w: Tensor, group_size: int) -> float:
    return on_grid(w, group_size).float().mean().item()


def _measured(report: TensorReport, w: Tensor, kind: Kind, size: int | None) -> TensorReport:
    assert size is not None, "a tensor that looks ternary fits groups of 8"
    scales = torch.cat([part.abs().amax(-1).flatten() for part in split_groups(w, size)])
    scales = scales[scales > 0].float()
    return replace(
        report,
        kind=kind,
        group_size=size,
        zero_share=(w == 0).float().mean().item(),
        off_grid_values=off_grid_values(w, size),
        scale_min=scales.min().item() if len(scales) else None,
        scale_max=scales.max().item() if len(scales) else None,
    )
