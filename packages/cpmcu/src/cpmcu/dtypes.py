"""Names of dtypes, and numbers of each in NumPy.

NumPy has no bfloat16: such numbers are held as their bits, in uint16, under the name "bfloat16".
`ml_dtypes` would give them a dtype, and arithmetic that nothing here does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cpmcu._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("float32", "bfloat16", "float16")
STORED = {
    "float64": np.float64, "float32": np.float32, "bfloat16": np.uint16, "float16": np.float16,
    "int64": np.int64, "int32": np.int32, "int8": np.int8, "uint8": np.uint8,
}  # fmt: skip


def name_of(dtype: Any) -> str:
    """The name of a dtype: of PyTorch's, or a name itself."""
    return str(dtype).removeprefix("torch.")


def size_of(dtype: Any) -> int:
    """Bytes of one number."""
    return np.dtype(STORED[name_of(dtype)]).itemsize


def to_floats(array: np.ndarray, dtype: str, through: str = "float32") -> np.ndarray:
    """Numbers of a dtype as float32, rounded to those of `through` ("float32" or "bfloat16")."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        values = array.astype(np.float32)
    return to_floats(to_bfloat16(values), "bfloat16") if through == "bfloat16" else values


def of_floats(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers rounded to a dtype of `FLOATS`; other arrays as they are."""
    if values.dtype != np.float32:
        return values
    return to_bfloat16(values) if dtype == "bfloat16" else values.astype(STORED[dtype])


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16 of float32 numbers, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def to_torch(array: np.ndarray, dtype: str) -> Tensor:
    """The same memory as a tensor of that dtype."""
    if dtype != "bfloat16":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor's memory, on the CPU, as NumPy sees it here."""
    tensor = tensor.detach().cpu()
    if name_of(tensor.dtype) == "bfloat16":
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def address(values: Any) -> int | None:
    """Where the numbers of an array, a tensor or None begin."""
    if values is None:
        return None
    return values.ctypes.data if isinstance(values, np.ndarray) else values.data_ptr()
