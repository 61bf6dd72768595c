"""Pseudo-quantised model folders to packed ones and back, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ._files import atomic_path, write_json
from .checkpoint import Checkpoint, copy_companions, read_config, write_shards
from .config import TernaryConfig
from .format import QUANT_METHOD, VERSION, PackedFile, is_packed, save_packed
from .inspect import CheckpointReport, inspect_checkpoint
from .packing import CODECS, PackedTensor
from .recover import SMALLEST_EVIDENCE

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class PackReport:
    """What packing did.

    Attributes:
        bytes_before: of the weight files.
        bytes_after: of the packed file.
        group_size: -1 for whole rows.
        codec: "1.6bit" or "2bit".
        tensors: packed matrices: name to (bytes before, bytes after).
        kept: names of the tensors that stayed as they were.
    """

    bytes_before: int
    bytes_after: int
    group_size: int
    codec: str
    tensors: dict[str, tuple[int, int]]
    kept: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return asdict(self)


def pack_model(
    src_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    config: TernaryConfig | None = None,
    codec: str = "1.6bit",
    progress: Progress | None = None,
) -> PackReport:
    """Pack a pseudo-quantised model folder without loss (but for -0.0, which becomes 0.0).

    The ternary matrices are found from the data. Everything else keeps its dtype in the same file;
    config.json gets a `quantization_config`, and the tokenizer's files are copied.

    Args:
        src_dir: model folder with safetensors files.
        out_dir: folder to write, atomically; one that exists is replaced.
        config: its group size and `skip` are used; None finds the group size from the data.
        codec: "1.6bit" (smallest) or "2bit".
        progress: called with (tensors done, tensors in all).

    Raises:
        FileNotFoundError: there is no safetensors file.
        ValueError: no tensor is ternary; one is damaged, or ternary in other groups; the model is
            packed or quantised otherwise; `out_dir` is `src_dir`.
    """
    source, target = Path(src_dir), Path(out_dir)
    check_target(source, target)
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {', '.join(CODECS)}; got {codec!r}")
    model_config = unquantised_config(source)
    report = inspect_checkpoint(source)
    config = config or TernaryConfig(group_size=_size_of(report))
    if config.grid != "ternary":
        raise ValueError(f"only the ternary grid can be packed, got grid={config.grid!r}")
    if 0 < config.group_size < SMALLEST_EVIDENCE:
        raise ValueError(
            f"group_size must be >= {SMALLEST_EVIDENCE} or -1 to pack a model: smaller groups "
            f"of any weights look ternary by chance; got {config.group_size}"
        )
    packed: dict[str, PackedTensor] = {}
    kept: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, int]] = {}
    with Checkpoint(source) as checkpoint:
        for done, tensor in enumerate(report.tensors, 1):
            name, w = tensor.name, checkpoint.tensor(tensor.name)
            # A damaged matrix is tried too: recover() says what is wrong with it.
            if tensor.kind == "full" or config.skips(name):
                kept[name] = w
            else:
                packed[name] = PackedTensor.from_weights(w, config.group_size, codec, name)
                sizes[name] = (w.nbytes, packed[name].nbytes)
            if progress:
                progress(done, len(report.tensors))
        before = checkpoint.bytes_of()
    if not packed:
        raise ValueError(
            f"{source} has no ternary tensor outside skip={config.skip}: see `inspect`"
        )
    model_config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "group_size": config.group_size,
        "codec": codec,
    }
    with atomic_path(target) as folder:
        folder.mkdir()
        copy_companions(source, folder)
        save_packed(folder / "model.safetensors", packed, kept)
        write_json(folder / "config.json", model_config)
        after = (folder / "model.safetensors").stat().st_size
    return PackReport(before, after, config.group_size, codec, sizes, tuple(kept))


def unpack_model(
    packed_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    progress: Progress | None = None,
) -> None:
    """Write the pseudo-quantised model folder that `pack_model` was given.

    Args:
        packed_dir: folder made by `pack_model`.
        out_dir: folder to write, atomically; one that exists is replaced. Weights above 4 GiB are
            written in shards.
        progress: called with (tensors done, tensors in all).

    Raises:
        FileNotFoundError: there is no packed file.
        ValueError: it is damaged or not a packed one; `out_dir` is `packed_dir`.
    """
    source, target = Path(packed_dir), Path(out_dir)
    check_target(source, target)
    model_config = plain_config(source)
    with PackedFile(source) as file, atomic_path(target) as folder:
        names = file.names()
        done = 0

        def read(name: str) -> Tensor:
            nonlocal done
            done += 1
            if progress:
                progress(done, len(names))
            return file.tensor(name)

        folder.mkdir()
        copy_companions(source, folder)
        write_shards(folder, names, file.bytes_of, read)
        if model_config:
            write_json(folder / "config.json", model_config)


def plain_config(folder: Path) -> dict[str, Any]:
    """config.json of a packed folder without what packing added to it."""
    config = read_config(folder)
    config.pop("quantization_config", None)
    return config


def unquantised_config(source: Path) -> dict[str, Any]:
    """config.json of a folder; ValueError if its weights are packed or quantised otherwise."""
    with Checkpoint(source) as checkpoint:
        if is_packed(checkpoint):
            raise ValueError(f"{source} is packed already: see `bitcpm inspect`")
    config = read_config(source)
    if found := config.get("quantization_config"):
        raise ValueError(
            f"{source}/config.json has quantization_config {found}: bitcpm packs plain "
            "float32, bfloat16 or float16 weights"
        )
    return config


def _size_of(report: CheckpointReport) -> int:
    if report.group_size is not None:
        return report.group_size
    damaged = report.of_kind("damaged")
    if damaged:
        raise ValueError(
            f"{damaged[0].name} and {len(damaged) - 1} more tensors have "
            f"values off the ternary grid ({damaged[0].off_grid_values} in this one): were the "
            "weights changed after quantisation?"
        )
    sizes = sorted({t.group_size for t in report.of_kind("ternary") if t.group_size})
    if sizes:
        raise ValueError(f"{report.path} mixes group sizes {sizes}: no common one to pack with")
    raise ValueError(
        f"{report.path} has no ternary tensor: finish QAT with bitcpm.materialise, or see "
        "`bitcpm quantise`"
    )


def check_target(source: Path, target: Path) -> None:
    """Raise unless `source` is a folder and writing the folder `target` leaves it alone."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder: expected a model folder")
    here, there = source.resolve(), target.resolve()
    if here == there or there in here.parents or here in there.parents:
        raise ValueError(f"{target} overlaps {source}: write to another folder")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: name a folder to write")
