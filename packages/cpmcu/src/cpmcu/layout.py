"""Quantised models in safetensors: the layout of `docs/layout.md`, written and read.

A matrix NAME of 4 or 8 bits is two tensors: NAME.codes and NAME.scales. Everything else is stored
as in the original. That a folder is in this layout, its `quantization_config` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmcu._fields import Fields
from cpmcu._files import atomic_path, write_json
from cpmcu._torch import torch
from cpmcu.codes import BITS, GROUPS, Codes

if TYPE_CHECKING:
    from torch import Tensor

METHOD, VERSION = "cpmcu", 1
CODES, SCALES = ".codes", ".scales"
STORED = {"U8": 4, "I8": 8}  # safetensors' dtype of the codes: bits of a code


def to_bytes(codes: Codes) -> Tensor:
    """Codes as they are stored: int8 [O, I], or uint8 [O, I / 2] with code + 8 of column 2 j in the
    low and of column 2 j + 1 in the high four bits of byte j.
    """
    if codes.bits == 8:
        return codes.codes.contiguous()
    shifted = (codes.codes + 8).to(torch.uint8)
    return shifted[:, 0::2] | shifted[:, 1::2] << 4


def from_bytes(stored: Tensor) -> Tensor:
    """The codes, int8 [O, I]: the inverse of `to_bytes`."""
    if stored.dtype == torch.int8:
        return stored
    pairs = torch.stack((stored & 15, stored >> 4), -1)
    return pairs.flatten(1).to(torch.int8) - 8


def write_shard(
    path: Path, tensors: Mapping[str, Tensor | Codes], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (names as in transformers) atomically as one safetensors file.

    `metadata` should be one entry: safetensors writes several in an order of chance.
    """
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Codes):
            stored[name + CODES] = to_bytes(tensor)
            stored[name + SCALES] = tensor.scales.contiguous()
        else:
            stored[name] = tensor.contiguous()
    with atomic_path(path) as target:
        save_file(stored, target, metadata=dict(metadata or {"format": "pt"}))


def write_index(folder: Path, shards: list[str]) -> None:
    """Write `model.safetensors.index.json` over the shards that lie in `folder`."""
    from safetensors import safe_open

    weight_map, size = {}, 0
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), shard)
        size += (folder / shard).stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def quantization_config(
    bits: int, group: int, algorithm: Mapping[str, Any], *, sinks: bool = False
) -> dict[str, Any]:
    """What stands in `config.json` under "quantization_config"."""
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "bits": bits,
        "group_size": group,
        "sinks": sinks,
        "algorithm": dict(algorithm),
    }


def quant_of(config: Fields) -> str:
    """ "int4" or "int8", from the `quantization_config`; ValueError where it is of another kind."""
    version = config.integer("version", low=0)
    if version != VERSION:
        raise config.error("version", f"is {version}, this cpmcu reads {VERSION}: upgrade it")
    bits, group = config.integer("bits"), config.integer("group_size")
    if bits not in BITS.values():
        raise config.error("bits", f"must be one of {tuple(BITS.values())}, got {bits}")
    if group not in GROUPS:
        raise config.error("group_size", f"must be one of {GROUPS}, got {group}")
    return f"int{bits}"


def stored_shape(
    name: str, codes: tuple[str, tuple[int, ...]], scales: tuple[str, tuple[int, ...]], where: Path
) -> tuple[int, int]:
    """Shape of the matrix `name`, from (dtype, shape) of its two parts as the header has them.

    Raises:
        ValueError: they are no codes and scales, or do not fit each other.
    """
    (kind, shape), (scale_kind, scale_shape) = codes, scales
    fits = kind in STORED and scale_kind == "F16" and len(shape) == len(scale_shape) == 2
    if fits:
        rows, columns = shape[0], shape[1] * (2 if kind == "U8" else 1)
        groups = scale_shape[1]
        fits = scale_shape[0] == rows and groups > 0 and columns in [groups * g for g in GROUPS]
        if fits:
            return rows, columns
    raise ValueError(
        f"{where}: tensor '{name}' has codes {kind} {shape} and scales {scale_kind} {scale_shape}; "
        f"expected U8 [O, I / 2] or I8 [O, I], and F16 [O, I / g] with g in {GROUPS}"
    )


def scale_fault(name: str, where: Path) -> str:
    """What is wrong where a scale of the matrix `name` is not finite."""
    return f"{where}: tensor '{name}{SCALES}' is not finite: copy the file again"


def to_codes(name: str, codes: Tensor, scales: Tensor, where: Path) -> Codes:
    """The matrix of the two stored parts; ValueError where a scale is not finite."""
    if not bool(scales.isfinite().all()):
        raise ValueError(scale_fault(name, where))
    return Codes(from_bytes(codes), scales, 4 if codes.dtype == torch.uint8 else 8)
