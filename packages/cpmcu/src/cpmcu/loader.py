"""Put a model's weights into memory: safetensors folders, GGUF files, packed ternary folders.

Files are untrusted: names, dtypes and shapes are checked against the spec before memory for the
model is taken, and nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cpmcu import gguf_codes, layout
from cpmcu._fields import Fields, read_json
from cpmcu.gguf_file import GGUFFile
from cpmcu.spec import ModelSpec, from_folder
from cpmcu.spec_gguf import from_gguf, interleaved_heads, transformers_name
from cpmcu.weights import Weights, allocate

Progress = Callable[[int, int], None]
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")


class Source:
    """A model on disk: its `spec`, its `kind` ("safetensors", "quantised", "gguf", "ternary").

    `quant` is the kind of weights that most of it is stored in, where the kernels have it: "int4",
    "int8" or None.

    Raises FileNotFoundError where nothing, or no weights, lie at `path`, and ValueError where the
    metadata is wrong. Reads headers only.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.gguf: GGUFFile | None = None
        if self.path.suffix == ".gguf" or self.path.is_file():
            self.gguf = GGUFFile(self.path)
            self.kind, self.spec, self.files = "gguf", from_gguf(self.gguf), [self.path]
            self.quant = gguf_codes.quant_of(self.gguf)
            return
        if not self.path.is_dir():
            raise FileNotFoundError(f"{path}: no such model; expected a folder or a .gguf file")
        self.spec = from_folder(self.path)
        self.kind, self.quant = _folder_kind(read_json(self.path / "config.json"))
        self.files = _shards(self.path)

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.files)

    def load(self, dtype: torch.dtype, progress: Progress | None = None) -> Weights:
        """All weights in `dtype`. `progress(done, total)` is called per tensor.

        `tensors.load_codes` keeps the codes of a quantised model instead.
        """
        if self.kind == "quantised":
            return _load_quantised(self, dtype, progress)
        if self.gguf is not None:
            return _load_gguf(self.gguf, self.spec, dtype, progress)
        if self.kind == "ternary":
            return _load_ternary(self.path, self.spec, dtype, progress)
        return _load_safetensors(self.path, self.files, self.spec, dtype, progress)


def _folder_kind(config: Fields) -> tuple[str, str | None]:
    quantisation = config.child("quantization_config")
    if quantisation is None:
        return "safetensors", None
    method = quantisation.text("quant_method")
    if method == layout.METHOD:
        return "quantised", layout.quant_of(quantisation)
    if method != "bitcpm":
        known = f"'{layout.METHOD}', 'bitcpm' (or none)"
        raise quantisation.error("quant_method", f"is '{method}', supported are {known}")
    return "ternary", None


def _shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        weight_map = read_json(index).child("weight_map")
        if weight_map is None:
            raise ValueError(f"{index}: field 'weight_map' is missing")
        names = sorted({weight_map.text(tensor) for tensor in weight_map.values})
        if any(Path(name).name != name or len(name.encode()) > 255 for name in names):
            shown = [name[:60] for name in names[:9]]
            raise ValueError(f"{index}: field 'weight_map' must name files beside it, got {shown}")
        for name in names:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: shard named by {index.name} is missing")
        if names:
            return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    others = sorted(folder.glob("*.safetensors"))
    if others:
        return others
    raise FileNotFoundError(
        f"{folder}: no weights; expected {_SINGLE}, or {_INDEX} and its shards "
        "(pickled .bin files are not read)"
    )


def opened(file: Path):  # noqa: ANN202 - safetensors.safe_open has no public type
    """A safetensors file; ValueError where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{file}: not a valid safetensors file ({error}); copy it again") from None


def clean_name(name: str) -> str | None:
    """The slot's name; None for buffers of old checkpoints that are computed, not stored."""
    name = name.removeprefix("model.")
    return None if name.endswith("rotary_emb.inv_freq") else name


def check_dtype(name: str, kind: str, file: Path) -> None:
    """ValueError unless `kind`, safetensors' name of a dtype, is one of floats."""
    if kind not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise ValueError(f"{file}: tensor '{name}' has dtype {kind}, expected one of {known}")


def check_tensors(found: Mapping[str, tuple[int, ...]], spec: ModelSpec, where: Path) -> None:
    """ValueError unless the file holds exactly the tensors of the spec."""
    wanted = spec.tensors()
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"{where}: tensor '{missing[0]}' is missing ({len(missing)} of {len(wanted)} in all); "
            "the file is incomplete or config.json describes another model"
        )
    for name, shape in found.items():
        if spec.tie and name == "lm_head.weight":
            continue  # tied: a stored copy is redundant
        if name not in wanted:
            raise ValueError(
                f"{where}: tensor '{name}' has no place in a {spec.architecture} model"
            )
        if shape != wanted[name]:
            raise ValueError(f"{where}: tensor '{name}' has shape {shape}, expected {wanted[name]}")


def _load_safetensors(
    folder: Path, files: list[Path], spec: ModelSpec, dtype: torch.dtype, progress: Progress | None
) -> Weights:
    from safetensors import SafetensorError

    found: dict[str, tuple[int, ...]] = {}
    origin: dict[str, tuple[Path, str]] = {}
    for file in files:
        with opened(file) as tensors:
            for stored in tensors.keys():
                name, part = clean_name(stored), tensors.get_slice(stored)
                if name is None:
                    continue
                check_dtype(stored, part.get_dtype(), file)
                if name in origin:
                    raise ValueError(f"{file}: tensor '{stored}' is also in {origin[name][0].name}")
                found[name], origin[name] = tuple(part.get_shape()), (file, stored)
    check_tensors(found, spec, folder)
    weights = allocate(spec, dtype)
    done = 0
    for file in files:
        with opened(file) as tensors:
            for name, (where, stored) in origin.items():
                if where == file and name in weights.slots:
                    try:
                        weights.slots[name].copy_(tensors.get_tensor(stored))
                    except SafetensorError as error:
                        raise ValueError(
                            f"{file}: tensor '{stored}' is unreadable ({error})"
                        ) from None
                    done += 1
                    report(progress, done, len(weights.slots))
    return weights


def _load_gguf(
    file: GGUFFile, spec: ModelSpec, dtype: torch.dtype, progress: Progress | None
) -> Weights:
    names = {transformers_name(name): name for name in file.tensors}
    names.pop(None, None)
    found = {name: file.tensors[stored].shape for name, stored in names.items() if name is not None}
    check_tensors(found, spec, file.path)
    weights = allocate(spec, dtype)
    for done, (name, slot) in enumerate(weights.slots.items(), start=1):
        stored = names[name]
        if heads := interleaved_heads(spec, name):
            # [heads, D/2, 2, ...] as stored -> [heads, 2, D/2, ...] as half-rotation wants it
            value = file.read(stored)
            value = value.view(heads, -1, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
            slot.copy_(value)
        else:
            for first, piece in file.pieces(stored):
                slot[first : first + len(piece)].copy_(piece) if slot.dim() > 1 else slot.copy_(
                    piece
                )
        report(progress, done, len(weights.slots))
    return weights


def _load_quantised(source: Source, dtype: torch.dtype, progress: Progress | None) -> Weights:
    from cpmcu.tensors import Tensors

    with Tensors(source) as tensors:
        weights = allocate(source.spec, dtype)
        for done, (name, slot) in enumerate(weights.slots.items(), start=1):
            slot.copy_(tensors.read(name))
            report(progress, done, len(weights.slots))
    return weights


def ternary_tensors(folder: Path) -> Mapping[str, Tensor]:
    """All tensors of a folder packed by bitcpm, expanded; ImportError without bitcpm."""
    try:
        from bitcpm import load_packed
    except ImportError:
        raise ImportError(
            f"{folder}: packed ternary weights need bitcpm: pip install minicpm4-bitcpm "
            "(in a clone: pip install ./packages/bitcpm)"
        ) from None
    return load_packed(folder)


def _load_ternary(
    folder: Path, spec: ModelSpec, dtype: torch.dtype, progress: Progress | None
) -> Weights:
    tensors = ternary_tensors(folder)
    named = {name: tensor for stored, tensor in tensors.items() if (name := clean_name(stored))}
    check_tensors({name: tuple(tensor.shape) for name, tensor in named.items()}, spec, folder)
    weights = allocate(spec, dtype)
    for done, (name, slot) in enumerate(weights.slots.items(), start=1):
        slot.copy_(named[name])
        report(progress, done, len(weights.slots))
    return weights


def report(progress: Progress | None, done: int, total: int) -> None:
    """Call `progress`, if there is one."""
    if progress is not None:
        progress(done, total)
