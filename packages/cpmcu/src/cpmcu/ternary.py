"""Weights that are ternary already: {-a, 0, a} in every group of a row, as `bitcpm` packs them.

They are taken as they are, laid out exactly, and never quantised again.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpmcu import dtypes
from cpmcu.safetensors_file import DTYPES, SafetensorsFile

if TYPE_CHECKING:
    from torch import Tensor


def is_installed() -> tuple[bool, str]:
    """Whether bitcpm is there, and what to do if not."""
    if importlib.util.find_spec("bitcpm") is None:
        return False, "ternary weights need bitcpm: pip install minicpm4-bitcpm"
    return True, ""


@dataclass(frozen=True, slots=True)
class Packed:
    """A ternary matrix in numbers: codes int8 [rows, cols], scales [rows, groups] of `dtype`
    (bfloat16 as its bits), a group's columns (-1: a row's).
    """

    codes: np.ndarray
    scales: np.ndarray
    dtype: str
    group: int


class PackedFile:
    """A folder that bitcpm packed: `shapes` of all its tensors.

    Args:
        path: the folder.
        files: its weight files.

    Raises:
        ImportError: bitcpm is not installed.
        ValueError: the files contradict themselves.
    """

    def __init__(self, path: Path, files: Mapping[Path, SafetensorsFile]) -> None:
        try:
            from bitcpm import entries
        except ImportError:
            raise ImportError(
                f"{path}: packed ternary weights need bitcpm: pip install minicpm4-bitcpm "
                "(in a clone: pip install ./packages/bitcpm)"
            ) from None
        self.path: str | os.PathLike[str] = path
        self.metadata: dict[str, str] = {}
        self._where: dict[str, SafetensorsFile] = {}
        for file in files.values():
            self.metadata |= file.metadata
            for name in file.tensors:
                if name in self._where:
                    raise ValueError(f"{file.path}: tensor {name} is in another shard too")
                self._where[name] = file
        self._entries, plain = entries.read(self)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.shapes |= {name: self.shape(name) for name in plain}

    def names(self) -> list[str]:
        """Of the tensors that are stored."""
        return list(self._where)

    def dtype(self, name: str) -> str:
        """Of a stored tensor, as safetensors calls it."""
        return self._where[name].tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a stored tensor."""
        return self._where[name].tensors[name].shape

    def array(self, name: str) -> tuple[np.ndarray, str]:
        """A tensor of the model, expanded: its numbers, and the name of the dtype they had."""
        if name not in self._entries:
            return self._where[name].array(name), DTYPES[self.dtype(name)]
        from bitcpm import arrays

        matrix = self._matrix(name)
        scales = dtypes.to_floats(matrix.scales, matrix.dtype)
        values = arrays.dequantise(matrix.codes, scales, matrix.group)
        if matrix.dtype == "bfloat16":  # exactly: they are scales
            return dtypes.to_bfloat16(values), matrix.dtype
        return values.astype(dtypes.STORED[matrix.dtype]), matrix.dtype

    def matrices(self, names: Sequence[str]) -> Any:
        """What makes one `Packed` of matrices of one kind, one below the other; None: they are not.

        They are read when it is called.
        """
        found = [self._entries.get(name) for name in names]
        if None in found or len({(e.group_size, e.dtype, e.shape[1]) for e in found}) != 1:
            return None

        def stacked() -> Packed:
            parts = [self._matrix(name) for name in names]
            codes, scales = (
                np.concatenate([getattr(part, what) for part in parts])
                for what in ("codes", "scales")
            )
            return Packed(codes, scales, parts[0].dtype, parts[0].group)

        return stacked

    def _matrix(self, name: str) -> Packed:
        from bitcpm import arrays

        entry, kind = self._entries[name], DTYPES[self._entries[name].dtype]
        raw = self._where[f"{name}.codes"].array(f"{name}.codes")
        scales = self._where[f"{name}.scales"].array(f"{name}.scales")
        try:
            codes = arrays.unpack(raw, entry.shape[1], entry.codec)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        numbers = dtypes.to_floats(scales, kind)
        if not (np.isfinite(numbers) & (numbers >= 0)).all():
            raise ValueError(f"{name}: scales must be finite and >= 0: damaged data")
        return Packed(codes, scales.copy(), kind, entry.group_size)


def recovered(values: np.ndarray) -> Packed | None:
    """The matrix float32 `[rows, cols]` in the largest groups that fit it; None: not ternary."""
    from bitcpm import arrays

    found = arrays.recover(values)
    if found is None:
        return None
    codes, scales, group = found
    return Packed(codes, scales, "float32", group)


def packed(weight: Tensor, codec: str) -> Any:
    """A tensor `[rows, cols]` in the largest groups that fit it, a `bitcpm.PackedTensor`; None: not
    ternary.
    """
    from bitcpm import PackedTensor
    from bitcpm.group_size import fit_sizes
    from bitcpm.recover import looks_ternary

    group = fit_sizes(weight).largest() if looks_ternary(weight) else None
    return None if group is None else PackedTensor.from_weights(weight, group, codec)


def check_found(matrices: int) -> None:
    """ValueError where quant="ternary" found no ternary matrix in a model."""
    if not matrices:
        raise ValueError(
            "quant='ternary' needs weights that are ternary, and no matrix is: quantise the model "
            "with bitcpm first, or take another quant"
        )
