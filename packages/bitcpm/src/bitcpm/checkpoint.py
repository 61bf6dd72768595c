"""Model folders of safetensors files: reading tensor by tensor, writing in shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# safetensors' names of the dtypes that can hold ternary weights.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
# What belongs to a model besides weights and config.json. Other files (a manifest, the state of an
# optimiser) describe the source folder and would be wrong in a copy.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "generation_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a model folder (one file or shards with an index) or of one file.

    Use as a context manager. Sizes and dtypes come from the headers; no tensor is read before it is
    asked for, and never through pickle.

    Raises:
        FileNotFoundError: there is no safetensors file.
        ValueError: a file is damaged, or the index names what is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}
        self.metadata: dict[str, str] = {}
        try:
            for file in _weight_files(self.path):
                self._open(file)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, file: Path) -> None:
        try:
            stream = self._stack.enter_context(safe_open(file, framework="pt"))
            self.metadata |= stream.metadata() or {}
            for name in stream.keys():
                if name in self._where:
                    raise ValueError(f"{file}: tensor {name} is in another shard too")
                self._where[name] = stream
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or no safetensors file: {error}") from None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        """The tensors' names, sorted."""
        return sorted(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors calls it ("BF16"), from the header."""
        return self._where[name].get_slice(name).get_dtype()

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        try:
            return self._where[name].get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.path}: tensor {name} cannot be read: {error}") from None

    def bytes_of(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in _weight_files(self.path))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; empty if there is none.

    Raises:
        ValueError: it is not a JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(config).__name__}")
    return config


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer, the model's own code and its licence, by their usual names."""
    if not source.is_dir():
        return
    for file in sorted(source.iterdir()):
        if file.is_file() and any(file.match(pattern) for pattern in COMPANIONS):
            # By content: a Hugging Face cache holds links.
            shutil.copyfile(file, target / file.name)


def write_shards(
    folder: Path,
    names: Iterable[str],
    size_of: Callable[[str], int],
    read: Callable[[str], Tensor],
    max_bytes: int = 4 << 30,
) -> None:
    """Write tensors as model.safetensors, or as shards with an index if they exceed `max_bytes`.

    At most one shard is in memory. `size_of` gives a tensor's bytes before `read` reads it.
    """
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name in names:
        size = size_of(name)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
        total += size
    index: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        save_file(
            {name: read(name).contiguous() for name in members}, folder / file, {"format": "pt"}
        )
        index |= dict.fromkeys(members, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: expected a model folder")
    if (path / INDEX).is_file():
        return _indexed_files(path / INDEX)
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    found = sorted(p.name for p in path.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    raise FileNotFoundError(
        f"{path} has no model.safetensors"
        + (f" but {', '.join(found[:3])}: convert it with save_pretrained first" if found else "")
    )


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index} has no weight_map from tensor to file names") from None
    for name in names:
        # The index may come from anyone: it must not reach outside its folder.
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
        ):
            raise ValueError(f"{index} names {name!r}, which is no safetensors file beside it")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is missing: download it again")
    return [index.parent / name for name in names]
