"""Models from one kind of file to another: GGUF, and folders in the layout of `layout.py`."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from cpmcu import layout, model_files, sinks
from cpmcu._files import atomic_path
from cpmcu._torch import torch
from cpmcu.codes import Codes, nearest
from cpmcu.gguf_export import Exported, export_gguf
from cpmcu.loader import Progress, Source
from cpmcu.tensors import Tensors

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS = {"Q8_0": 8, "Q4_0": 4}
KINDS = ("auto", *_DTYPES, *_BITS)  # of folders
log = logging.getLogger("cpmcu")


def convert(
    model: str | Path, out: str | Path, kind: str = "auto", progress: Progress | None = None
) -> Exported:
    """Write `model` to `out`: a GGUF file if its name ends with .gguf, else a folder.

    Args:
        model: folder or .gguf file.
        out: what to write; must not exist.
        kind: of the matrices. For GGUF see `gguf_export.export_gguf`. In a folder "auto" keeps
            codes of 4 and 8 bits, and expands other formats to float32; F32, F16, BF16 expand all;
            Q8_0 and Q4_0 (32 columns to a scale) round to nearest what is not in codes of these
            bits.
        progress: called with (tensors done, tensors in all).

    Raises:
        FileNotFoundError: no model.
        FileExistsError: there is something at `out`.
        ValueError: `kind` is unknown, or does not fit the model.
    """
    source, out = Source(model), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: remove it or take another name")
    if source.has_sinks and (out.suffix == ".gguf" or kind in _DTYPES):
        log.warning("%s: the keys and values stored for first tokens have no place there and are "
                    "left out", out)  # fmt: skip
    if out.suffix == ".gguf":
        return export_gguf(source, out, kind, progress)
    if kind not in KINDS:
        raise ValueError(f"type of a folder must be one of {', '.join(KINDS)}, got {kind!r}")
    with atomic_path(out) as target:
        target.mkdir()
        made = _folder(source, target, kind, progress)
    made.path = str(out)
    return made


def _folder(source: Source, out: Path, kind: str, progress: Progress | None) -> Exported:
    made, spec = Exported(str(out)), source.spec
    names = list(spec.tensors())
    outer = [name for name in names if not name.startswith("layers.")]
    parts = [outer] + [
        [name for name in names if name.startswith(f"layers.{i}.")] for i in range(spec.layers)
    ]
    shards = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    found: set[tuple[int, int]] = set()  # bits and groups of the layers
    done = 0
    with Tensors(source) as tensors:
        for shard, part in zip(shards, parts, strict=True):
            held = {}
            for name in part:
                value, error = _tensor(tensors, name, kind)
                held[name if name.startswith("lm_head") else f"model.{name}"] = value
                label = str(value.dtype).removeprefix("torch.")
                if isinstance(value, Codes):
                    label = value.quant
                    found |= {(value.bits, value.group)} if part is not outer else set()
                made.kinds[label] = made.kinds.get(label, 0) + 1
                if error:
                    made.errors[name] = error
                done += 1
                if progress is not None:
                    progress(done, len(names))
            layout.write_shard(out / shard, held)
    layout.write_index(out, shards)
    quantization = None
    if found or any(label.startswith("int") for label in made.kinds):
        bits, group = min(found, default=(8, 32))
        algorithm = {"name": f"convert {kind}"}
        quantization = layout.quantization_config(bits, group, algorithm, sinks=source.has_sinks)
        if source.has_sinks:
            shutil.copyfile(source.path / sinks.FILE, out / sinks.FILE)
    model_files.write(source, out, quantization=quantization)
    made.bytes = sum((out / shard).stat().st_size for shard in shards)
    return made


def _tensor(tensors: Tensors, name: str, kind: str) -> tuple[torch.Tensor | Codes, float]:
    """A tensor as it is stored, and its relative error."""
    matrix = tensors.codes(name)
    bits = _BITS.get(kind)
    if bits == 4 and not name.startswith("layers."):
        bits = 8
    if matrix is not None and (kind == "auto" or bits == matrix.bits):
        return matrix, 0.0
    values = tensors.read(name)
    if values.dim() == 1 or kind == "auto":
        return values, 0.0
    held = values.to(_DTYPES[kind]) if bits is None else nearest(values, bits)
    exact = values.double()
    after = held.dequantise() if isinstance(held, Codes) else held
    norm = float(exact.norm())
    return held, float((exact - after.double()).norm()) / norm if norm else 0.0
