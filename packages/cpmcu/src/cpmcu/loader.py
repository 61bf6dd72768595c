"""A model on disk: safetensors folders, GGUF files, packed ternary folders. `tensors` reads them.

Files are untrusted: names, dtypes and shapes are checked against the spec before memory for the
model is taken, and nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from cpmcu import gguf_codes, layout
from cpmcu._fields import Fields, read_json
from cpmcu.gguf_file import GGUFFile
from cpmcu.spec import ModelSpec, from_folder
from cpmcu.spec_gguf import from_gguf

Progress = Callable[[int, int], None]
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")


class Source:
    """A model on disk: its `spec`, its `kind` ("safetensors", "quantised", "gguf", "ternary").

    `quant` is the kind of weights that most of it is stored in, where all kernels have it: "int4",
    "int8" or None; `native_quant`, where the CPU's do; `has_sinks`: `sinks` lie beside them.

    Raises FileNotFoundError where nothing, or no weights, lie at `path`, and ValueError where the
    metadata is wrong. Reads headers only.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.gguf: GGUFFile | None = None
        self.has_sinks = False
        if self.path.suffix == ".gguf" or self.path.is_file():
            self.gguf = GGUFFile(self.path)
            self.kind, self.spec, self.files = "gguf", from_gguf(self.gguf), [self.path]
            self.quant = gguf_codes.quant_of(self.gguf)
            self.native_quant = gguf_codes.quant_of(self.gguf, gguf_codes.NATIVE_KINDS)
            return
        if not self.path.is_dir():
            raise FileNotFoundError(f"{path}: no such model; expected a folder or a .gguf file")
        self.spec = from_folder(self.path)
        config = read_json(self.path / "config.json")
        self.kind, self.quant = _folder_kind(config)
        if self.kind == "quantised":
            self.has_sinks = config.child("quantization_config").boolean("sinks", False)
        self.native_quant = self.quant
        self.files = _shards(self.path)

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.files)


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


def clean_name(name: str) -> str | None:
    """The slot's name; None for buffers of old checkpoints that are computed, not stored."""
    name = name.removeprefix("model.")
    return None if name.endswith("rotary_emb.inv_freq") else name


def check_dtype(name: str, file: Path, kind: str) -> None:
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


def report(progress: Progress | None, done: int, total: int) -> None:
    """Call `progress`, if there is one."""
    if progress is not None:
        progress(done, total)
