"""One tensor of a model at a time, by its transformers name, whatever kind of file holds it.

For what must not hold a whole model in memory twice: loading, quantisation, conversion. `read` and
`codes` give PyTorch's tensors, `parts` and `vector` what the CPU backend lays out, without PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpmcu import dtypes, gguf_codes, layout, loader, ternary
from cpmcu._torch import torch
from cpmcu.codes import Codes, stack
from cpmcu.loader import Progress, Source
from cpmcu.safetensors_file import DTYPES, SafetensorsFile
from cpmcu.spec import ModelSpec
from cpmcu.spec_gguf import halves, interleaved_heads, transformers_name
from cpmcu.stored import SHIFTED, Part, Stored
from cpmcu.weights import Layer, Weights

if TYPE_CHECKING:
    from torch import Tensor

# Which of GGUF's types are read as they lie.
_DIRECT = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"} | {
    kind: kind for kind in ("Q4_0", "Q8_0", "Q4_1", "Q4_K")
}


class Tensors:
    """The tensors of `source`, checked against its spec when this is made; a context manager.

    Names are those of `ModelSpec.tensors`.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.spec = source, source.spec
        self._files: dict[Path, SafetensorsFile] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._where: dict[str, tuple[str, Path]] = {}  # its name there, the file
        self._packed: ternary.PackedFile | None = None
        self._open()
        loader.check_tensors(self._shapes, self.spec, source.path)

    def __enter__(self) -> Tensors:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Let the files go."""
        self.release()

    def release(self) -> None:
        """Give back the memory that what was read of the files takes; reading goes on as before."""
        for file in self._files.values():
            file.release()
        if self.source.gguf is not None:
            self.source.gguf.release()

    def _open(self) -> None:
        source = self.source
        if source.gguf is not None:
            for stored, info in source.gguf.tensors.items():
                if name := transformers_name(stored):
                    self._shapes[name] = info.shape
                    self._where[name] = stored, source.path
            return
        for path in source.files:
            self._files[path] = SafetensorsFile(path)
        if source.kind == "ternary":
            self._packed = ternary.PackedFile(source.path, self._files)
            for stored, shape in self._packed.shapes.items():
                if name := loader.clean_name(stored):
                    self._shapes[name], self._where[name] = shape, (stored, source.path)
            return
        for path, file in self._files.items():
            self._add(path, file)
        self._join()

    def _add(self, path: Path, file: SafetensorsFile) -> None:
        for stored, info in file.tensors.items():
            if (name := loader.clean_name(stored)) is None:
                continue
            if name in self._where:
                raise ValueError(f"{path}: tensor '{stored}' is also in {self._where[name][1]}")
            self._kinds[name] = info.dtype, info.shape
            self._where[name] = stored, path

    def _join(self) -> None:
        """Shapes of plain tensors, and of matrices in two parts."""
        for name, (kind, shape) in self._kinds.items():
            stem = name.removesuffix(layout.CODES).removesuffix(layout.SCALES)
            if self.source.kind != "quantised" or stem == name:
                loader.check_dtype(*self._where[name], kind)
                self._shapes[name] = shape
                continue
            parts = [self._kinds.get(stem + end) for end in (layout.CODES, layout.SCALES)]
            where = self._where[name][1]
            if parts[0] is None or parts[1] is None:
                raise ValueError(
                    f"{where}: tensor '{name}' comes without its other part; the file is incomplete"
                )
            self._shapes[stem] = layout.stored_shape(stem, parts[0], parts[1], where)

    def _array(self, name: str) -> np.ndarray:
        stored, path = self._where[name]
        return self._files[path].array(stored)

    def _tensor(self, name: str) -> Tensor:
        # A copy: the file may change under a tensor that is a view of it.
        return dtypes.to_torch(self._array(name).copy(), DTYPES[self._kinds[name][0]])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor in floats; in None, the dtype it is stored in, or expanded to float32."""
        matrix = self.codes(name)
        if matrix is not None:
            return matrix.dequantise(dtype or torch.float32)
        stored, _ = self._where[name]
        if self._packed is not None:
            value, kind = self._packed.array(stored)
            value = dtypes.to_torch(value.copy(), kind)
            return value if dtype is None else value.to(dtype)
        if self.source.gguf is None:
            value = self._tensor(name)
            return value if dtype is None else value.to(dtype)
        value = self.source.gguf.read(stored, dtype or torch.float32)
        if heads := interleaved_heads(self.spec, name):
            return value[halves(len(value), heads)]
        return value

    def codes(self, name: str) -> Codes | None:
        """A matrix as the codes it is stored as; None where the kernels have no such kind."""
        if self.source.kind == "quantised" and name + layout.CODES in self._where:
            parts = (self._tensor(name + end) for end in (layout.CODES, layout.SCALES))
            return layout.to_codes(name, *parts, self._where[name + layout.CODES][1])
        if self.source.gguf is None:
            return None
        matrix = gguf_codes.read(self.source.gguf, self._where[name][0])
        if matrix is not None and (heads := interleaved_heads(self.spec, name)):
            return matrix.rows(torch.from_numpy(halves(matrix.shape[0], heads)))
        return matrix

    def kind(self, name: str) -> tuple[int, int]:
        """(bits, columns to a scale) that the CPU backend holds a matrix of codes in, (0, 0) of
        another, from the header.
        """
        if self.source.kind == "quantised" and name + layout.CODES in self._where:
            dtype, _ = self._kinds[name + layout.CODES]
            groups = self._kinds[name + layout.SCALES][1][1]
            return layout.STORED[dtype], self._shapes[name][1] // groups
        if self.source.gguf is None:
            return 0, 0
        bits = gguf_codes.NATIVE_KINDS.get(self._type(name), 0)
        return bits, gguf_codes.SIZE if bits else 0

    def _type(self, name: str) -> str:
        file = self.source.gguf
        return "" if file is None else file.tensors[self._where[name][0]].kind.name

    def parts(self, name: str) -> Iterator[Part]:
        """A matrix where it lies, or expanded piece by piece."""
        shape, (bits, group) = self._shapes[name], self.kind(name)
        if self._packed is not None:
            value, kind = self._packed.array(self._where[name][0])
            yield from _numbers(value, kind, shape)
        elif self.source.gguf is not None:
            yield from self._gguf_parts(name, shape, bits, group)
        elif bits:
            codes, scales = (self._array(name + end) for end in (layout.CODES, layout.SCALES))
            fault = layout.scale_fault(name, self._where[name + layout.CODES][1])
            source = "nibbles" if bits == 4 else "int8"
            yield Part(codes, source, shape, scales, bits, group, fault=fault)
        else:
            yield from _numbers(self._array(name), DTYPES[self._kinds[name][0]], shape)

    def _gguf_parts(self, name: str, shape: Any, bits: int, group: int) -> Iterator[Part]:
        file, stored = self.source.gguf, self._where[name][0]
        heads = interleaved_heads(self.spec, name)
        source = _DIRECT.get(self._type(name))
        if source is not None:
            fault = gguf_codes.scale_fault(file, stored)
            yield Part(file.raw(stored), source, shape, None, bits, group, heads, fault)
        elif heads:  # rows are to be put in order: in one piece
            pieces = np.concatenate([piece for _, piece in file.pieces(stored)])
            yield Part(pieces, "float32", shape, heads=heads)
        else:
            for _, piece in file.pieces(stored):
                yield Part(piece, "float32", piece.shape)

    def vector(self, name: str, dtype: str) -> np.ndarray:
        """A norm or a bias, float32, rounded to the numbers of `dtype`."""
        stored, _ = self._where[name]
        if self._packed is not None:
            value, kind = self._packed.array(stored)
        elif self.source.gguf is None:
            value, kind = self._array(name), DTYPES[self._kinds[name][0]]
        else:
            kind, value = "float32", np.concatenate([v for _, v in self.source.gguf.pieces(stored)])
            if heads := interleaved_heads(self.spec, name):
                value = value[halves(len(value), heads)]
        return dtypes.to_floats(value, kind, dtype)

    def matrix(self, names: tuple[str, ...], dtype: str, *, codes: bool) -> Stored:
        """Matrices of equal columns, one below the other; with `codes` as the codes they are stored
        as. Where some have 4 bits and some more, all are held in 8.
        """
        kinds = {self.kind(name) for name in names}
        same = codes and len({group for _, group in kinds}) == 1
        bits, group = max(kinds) if same else (0, 0)
        shifted = bits == 4 and any(self._type(name) in SHIFTED for name in names)
        rows = sum(self._shapes[name][0] for name in names)
        packed = self._packed and self._packed.matrices([self._where[name][0] for name in names])

        def parts() -> Iterator[Part]:
            for name in names:
                yield from self.parts(name)

        shape = rows, self._shapes[names[0]][1]
        return Stored(parts, shape, dtype, bits, group, packed, shifted)


def _numbers(value: np.ndarray, kind: str, shape: Any) -> Iterator[Part]:
    if kind == "float64":
        value, kind = dtypes.to_floats(value, kind), "float32"
    yield Part(value, kind, shape)


def load(
    source: Source, dtype: Any, *, codes: bool = False, native: bool = False,
    progress: Progress | None = None,
) -> Weights:  # fmt: skip
    """A model's weights in `dtype`; with `codes`, matrices as `Codes` where they are stored so.

    `layers` are read as they are taken, one after the other, and once: who changes their layout
    never holds both whole. Names, dtypes and shapes are checked before the first is read.
    `progress(done, total)` is called per layer. With `native` matrices are `Stored`, which
    read nothing before they are laid out, and vectors arrays: what `cpu_weights.pack_model` takes.

    Raises:
        ValueError: a file is damaged or not of this model.
    """
    spec, total, name_of = source.spec, source.spec.layers + 2, dtypes.name_of(dtype)

    def vector(*names: str) -> Any:
        if native:
            return np.concatenate([tensors.vector(name, name_of) for name in names])
        values = [tensors.read(name, getattr(torch, name_of)) for name in names]
        return torch.cat(values) if len(values) > 1 else values[0]

    def matrix(*names: str) -> Any:
        if native:
            return tensors.matrix(names, name_of, codes=codes)
        found = [tensors.codes(name) if codes else None for name in names]
        known = [part for part in found if part is not None]
        if len(known) == len(names) and len({(p.bits, p.group) for p in known}) == 1:
            whole = stack(known)
            whole.dtype = getattr(torch, name_of)
            return whole
        return vector(*names)

    def layers() -> Iterator[Layer]:
        with tensors:
            tensors.release()
            for i in range(spec.layers):
                loader.report(progress, i + 2, total)
                yield read_layer(spec, i, vector, matrix)
                tensors.release()
            loader.report(progress, total, total)

    tensors = Tensors(source)
    embedding = matrix("embed_tokens.weight")
    loader.report(progress, 1, total)
    head = embedding if spec.tie else matrix("lm_head.weight")
    if not native:  # there they are still to be read
        tensors.release()
    return Weights(embedding, layers(), vector("norm.weight"), head)


def read_layer(spec: ModelSpec, index: int, vector: Any, matrix: Any) -> Layer:
    """Layer `index`, from functions that read and stack vectors, and matrices, by their names."""
    p = f"layers.{index}."
    qkv = [p + f"self_attn.{n}_proj." for n in "qkv"]
    return Layer(
        attention_norm=vector(p + "input_layernorm.weight"),
        qkv=matrix(*(n + "weight" for n in qkv)),
        output=matrix(p + "self_attn.o_proj.weight"),
        ffn_norm=vector(p + "post_attention_layernorm.weight"),
        gate_up=matrix(p + "mlp.gate_proj.weight", p + "mlp.up_proj.weight"),
        down=matrix(p + "mlp.down_proj.weight"),
        qkv_bias=vector(*(n + "bias" for n in qkv)) if spec.qkv_bias else None,
        q_norm=vector(p + "self_attn.q_norm.weight") if spec.qk_norm else None,
        k_norm=vector(p + "self_attn.k_norm.weight") if spec.qk_norm else None,
    )
