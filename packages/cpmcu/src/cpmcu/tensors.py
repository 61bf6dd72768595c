"""One tensor of a model at a time, by its transformers name, whatever kind of file holds it.

For what must not hold a whole model in memory twice: loading, quantisation, conversion.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpmcu import gguf_codes, layout, loader
from cpmcu.codes import Codes, stack
from cpmcu.loader import Progress, Source
from cpmcu.spec import ModelSpec
from cpmcu.spec_gguf import interleaved_heads, transformers_name
from cpmcu.weights import Layer, Weights


class Tensors:
    """The tensors of `source`, checked against its spec when this is made; a context manager.

    Names are those of `ModelSpec.tensors`.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.spec = source, source.spec
        self._handles: dict[Path, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._where: dict[str, tuple[Any, str, Path]] = {}
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
        self._handles.clear()
        if self.source.gguf is not None:
            self.source.gguf.release()

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            self._handles[file] = loader.opened(file)
        return self._handles[file]

    def _open(self) -> None:
        source = self.source
        if source.gguf is not None:
            for stored, info in source.gguf.tensors.items():
                if name := transformers_name(stored):
                    self._shapes[name] = info.shape
                    self._where[name] = (source.gguf, stored, source.path)
        elif source.kind == "ternary":
            for stored, tensor in loader.ternary_tensors(source.path).items():
                if name := loader.clean_name(stored):
                    self._shapes[name] = tuple(tensor.shape)
                    self._where[name] = (tensor, stored, source.path)
        else:
            for file in source.files:
                self._add(file, self._handle(file))
            self._join()

    def _add(self, file: Path, tensors: Any) -> None:
        for stored in tensors.keys():
            if (name := loader.clean_name(stored)) is None:
                continue
            if name in self._where:
                raise ValueError(f"{file}: tensor '{stored}' is also in {self._where[name][2]}")
            part = tensors.get_slice(stored)
            self._kinds[name] = (part.get_dtype(), tuple(part.get_shape()))
            self._where[name] = (None, stored, file)

    def _join(self) -> None:
        """Shapes of plain tensors, and of matrices in two parts."""
        for name, (kind, shape) in self._kinds.items():
            stem = name.removesuffix(layout.CODES).removesuffix(layout.SCALES)
            if self.source.kind != "quantised" or stem == name:
                loader.check_dtype(self._where[name][1], kind, self._where[name][2])
                self._shapes[name] = shape
                continue
            parts = [self._kinds.get(stem + end) for end in (layout.CODES, layout.SCALES)]
            if parts[0] is None or parts[1] is None:
                raise ValueError(
                    f"{self._where[name][2]}: tensor '{name}' comes without its other part; the "
                    "file is incomplete"
                )
            where = self._where[name][2]
            self._shapes[stem] = layout.stored_shape(stem, parts[0], parts[1], where)

    def _get(self, name: str) -> Tensor:
        from safetensors import SafetensorError

        _, stored, file = self._where[name]
        try:
            return self._handle(file).get_tensor(stored)
        except SafetensorError as error:
            raise ValueError(f"{file}: tensor '{stored}' is unreadable ({error})") from None

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor in floats; in None, the dtype it is stored in, or expanded to float32."""
        matrix = self.codes(name)
        if matrix is not None:
            return matrix.dequantise(dtype or torch.float32)
        holder, stored, _ = self._where[name]
        if self.source.gguf is None:
            value = holder if isinstance(holder, Tensor) else self._get(name)
            # A copy: the file may change under a tensor that is a view of it.
            return value if dtype is None else value.to(dtype, copy=True)
        value = holder.read(stored, dtype or torch.float32)
        if heads := interleaved_heads(self.spec, name):
            return value[halves(len(value), heads)]
        return value

    def codes(self, name: str) -> Codes | None:
        """A matrix as the codes it is stored as; None where the kernels have no such kind."""
        if self.source.kind == "quantised" and name + layout.CODES in self._where:
            parts = (self._get(name + end) for end in (layout.CODES, layout.SCALES))
            return layout.to_codes(name, *parts, self._where[name + layout.CODES][2])
        if self.source.gguf is None:
            return None
        file, stored, _ = self._where[name]
        matrix = gguf_codes.read(file, stored)
        if matrix is not None and (heads := interleaved_heads(self.spec, name)):
            return matrix.rows(halves(matrix.shape[0], heads))
        return matrix


def halves(rows: int, heads: int) -> Tensor:
    """Order of rows from llama.cpp's neighbouring pairs to a head's two halves."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def pairs(rows: int, heads: int) -> Tensor:
    """Order of rows from a head's two halves to llama.cpp's neighbouring pairs."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def load(
    source: Source, dtype: torch.dtype, *, codes: bool = False, progress: Progress | None = None
) -> Weights:
    """A model's weights in `dtype`; with `codes`, matrices as `Codes` where they are stored so.

    `layers` are read as they are taken, one after the other, and once: who changes their layout
    never holds both whole. Names, dtypes and shapes are checked before the first is read.
    `progress(done, total)` is called per layer.

    Raises:
        ValueError: a file is damaged or not of this model.
    """
    spec, total = source.spec, source.spec.layers + 2

    def plain(name: str) -> Tensor:
        return tensors.read(name, dtype)

    def matrix(*names: str) -> Any:
        found = [tensors.codes(name) if codes else None for name in names]
        known = [part for part in found if part is not None]
        if len(known) == len(names) and len({(p.bits, p.group) for p in known}) == 1:
            whole = stack(known)
            whole.dtype = dtype
            return whole
        return torch.cat([plain(name) for name in names]) if len(names) > 1 else plain(names[0])

    def layers() -> Iterator[Layer]:
        with tensors:
            for i in range(spec.layers):
                loader.report(progress, i + 2, total)
                yield read_layer(spec, i, plain, matrix)
                tensors.release()
            loader.report(progress, total, total)

    tensors = Tensors(source)
    embedding = matrix("embed_tokens.weight")
    loader.report(progress, 1, total)
    head = embedding if spec.tie else matrix("lm_head.weight")
    tensors.release()
    return Weights(embedding, layers(), plain("norm.weight"), head)


def read_layer(spec: ModelSpec, index: int, plain: Any, matrix: Any) -> Layer:
    """Layer `index`, from functions that read a vector and stack matrices by their names."""
    p = f"layers.{index}."
    qkv = [p + f"self_attn.{n}_proj." for n in "qkv"]
    bias = torch.cat([plain(n + "bias") for n in qkv]) if spec.qkv_bias else None
    return Layer(
        attention_norm=plain(p + "input_layernorm.weight"),
        qkv=matrix(*(n + "weight" for n in qkv)),
        output=matrix(p + "self_attn.o_proj.weight"),
        ffn_norm=plain(p + "post_attention_layernorm.weight"),
        gate_up=matrix(p + "mlp.gate_proj.weight", p + "mlp.up_proj.weight"),
        down=matrix(p + "mlp.down_proj.weight"),
        qkv_bias=bias,
        q_norm=plain(p + "self_attn.q_norm.weight") if spec.qk_norm else None,
        k_norm=plain(p + "self_attn.k_norm.weight") if spec.qk_norm else None,
    )
