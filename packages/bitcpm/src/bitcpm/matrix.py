"""A ternary matrix in the CPU kernels' layout, and products with it.

The layout is `csrc/args.h`'s. It holds the same codes and scales as a `PackedTensor`, in an order
that vector instructions read as one stream; `from_packed` and `to_packed` are exact.

Letters: O output features, I input features, T tokens.
"""

from __future__ import annotations

import mmap
from typing import Any, Literal

import torch
from torch import Tensor

from .config import groups_of
from .cpu_library import (
    CODECS,
    DTYPES,
    MODES,
    Kernels,
    LayoutArgs,
    MultiplyArgs,
    PrepareArgs,
    Shape,
    aligned_bytes,
    kernels,
)
from .packing import PackedTensor, pack_codes

Mode = Literal["int8", "int8-group", "exact"]
LARGE_PAGE = 2 << 20


class TernaryMatrix:
    """A ternary matrix [O, I] for the CPU kernels.

    Args:
        data: uint8, the kernel layout.
        shape: (O, I).
        group_size: >= 1, or -1 for whole rows.
        codec: "2bit" or "1.6bit".
        scale_dtype: float32, bfloat16 or float16.

    Raises:
        ImportError: the kernels were not built.
        ValueError: `data` has another size than the shape asks for.
    """

    def __init__(
        self,
        data: Tensor,
        shape: tuple[int, int],
        group_size: int,
        codec: str,
        scale_dtype: torch.dtype,
    ) -> None:
        self._kernels = required_kernels()
        self.shape, self.group_size, self.codec = shape, group_size, codec
        self.scale_dtype = scale_dtype
        group, _, _ = groups_of(shape[1], group_size)
        self._shape = Shape(*shape, group, CODECS[codec], DTYPES[str(scale_dtype)])
        wanted = self._kernels.weight_bytes(self._shape)
        if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() != wanted:
            raise ValueError(
                f"a {shape} matrix in codec {codec} takes uint8 [{wanted}], got {data.dtype} "
                f"{list(data.shape)}"
            )
        if data.data_ptr() % 64:
            data = aligned_bytes(wanted).copy_(data)
        self.data = data
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made anew: addresses and the library do not travel."""
        return type(self), (
            self.data, self.shape, self.group_size, self.codec, self.scale_dtype
        )  # fmt: skip

    @classmethod
    def from_packed(cls, packed: PackedTensor, codec: str | None = None) -> TernaryMatrix:
        """Lay out a packed matrix, in its own codec or another."""
        library = required_kernels()
        codes, scales = packed.unpack()
        codec = codec or packed.codec
        group, _, _ = groups_of(packed.shape[1], packed.group_size)
        shape = Shape(*packed.shape, group, CODECS[codec], DTYPES[str(scales.dtype)])
        data = large_bytes(library.weight_bytes(shape))
        scales = scales.contiguous()
        args = LayoutArgs(shape, codes.data_ptr(), scales.data_ptr(), data.data_ptr())
        library.lay_out(args, torch.get_num_threads())
        return cls(data, packed.shape, packed.group_size, codec, scales.dtype)

    def to_packed(self) -> PackedTensor:
        """The same codes and scales in the order that files have."""
        O, I = self.shape
        _, full, tail = groups_of(I, self.group_size)
        codes = torch.empty(O, I, dtype=torch.int8)
        scales = torch.empty(O, full + bool(tail), dtype=self.scale_dtype)
        args = LayoutArgs(self._shape, codes.data_ptr(), scales.data_ptr(), self.data.data_ptr())
        self._kernels.take_out(args, torch.get_num_threads())
        packed = pack_codes(codes, self.codec)
        return PackedTensor(packed, scales, self.shape, self.group_size, self.codec)

    def copy(self) -> TernaryMatrix:
        """The same matrix in memory of its own."""
        data = large_bytes(self.nbytes).copy_(self.data)
        return TernaryMatrix(data, self.shape, self.group_size, self.codec, self.scale_dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the layout."""
        return self.data.nbytes

    def multiply(self, x: Tensor, bias: Tensor | None = None, mode: Mode = "int8") -> Tensor:
        """x W^T + bias on PyTorch's threads.

        "int8" rounds each token of x to int8 by its largest magnitude, "int8-group" each group of a
        token; the products are exact int32 sums. "exact" multiplies float32 activations. A result
        does not depend on the instruction set, the number of tokens or of threads, or the codec.

        Args:
            x: [..., I], float32, bfloat16 or float16, on the CPU; its rows may have any stride.
            bias: [O] or None, added in float32.
            mode: how activations are read.

        Returns:
            [..., O] in the dtype of `x`.

        Raises:
            ValueError: `x` has another last size, dtype or device; the mode is unknown.
        """
        O, I = self.shape
        if x.shape[-1:] != (I,) or str(x.dtype) not in DTYPES or x.device.type != "cpu":
            raise ValueError(
                f"x must be float [..., {I}] on the CPU for a {self.shape} matrix, "
                f"got {x.dtype} {list(x.shape)} on {x.device}"
            )
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
        rows = x.reshape(-1, I)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        T, number = rows.shape[0], MODES[mode]
        out = torch.empty(T, O, dtype=x.dtype)
        if bias is not None:
            bias = bias.detach().float().contiguous()
        if T:
            library, threads = self._kernels, torch.get_num_threads()
            sizes = self._sizes.get((T, number))
            if sizes is None:
                sizes = self._sizes[T, number] = library.sizes(self._shape, T, number)
            prepared = library.scratch(sizes[0] + threads * sizes[1])
            dtype, row = DTYPES[str(x.dtype)], rows.stride(0)
            library.prepare(
                PrepareArgs(self._shape, rows.data_ptr(), T, row, dtype, number, prepared),
                threads,
            )
            library.multiply(
                MultiplyArgs(
                    self._shape, self.data.data_ptr(), prepared, T, O, dtype, number,
                    out.data_ptr(), None if bias is None else bias.data_ptr(),
                    prepared + sizes[0], sizes[1],
                ),
                threads,
            )  # fmt: skip
        return out.reshape(*x.shape[:-1], O)


def required_kernels() -> Kernels:
    """The kernels.

    Raises:
        ImportError: they were not built.
    """
    library, reason = kernels()
    if library is None:
        raise ImportError(reason)
    return library


def large_bytes(size: int) -> Tensor:
    """uint8 [size] on a cache line, in large pages where the system gives them.

    Weights are read once for each token, and with 4 KiB pages a miss of the page table every
    64 cache lines costs a tenth of the bandwidth.
    """
    if size < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return aligned_bytes(size)
    memory = mmap.mmap(-1, size + LARGE_PAGE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping alive
    start = -data.data_ptr() % LARGE_PAGE
    return data[start : start + size]
