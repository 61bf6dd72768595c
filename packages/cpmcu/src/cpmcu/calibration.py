"""Calibration text on its way through a model, one layer at a time, in files between the layers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cpmcu import reference, tokenizer
from cpmcu._torch import torch
from cpmcu.loader import Source
from cpmcu.rope import RopeTable
from cpmcu.spec import ModelSpec
from cpmcu.weights import Layer

if TYPE_CHECKING:
    from torch import Tensor

F = torch.nn.functional

if TYPE_CHECKING:
    from cpmcu.quantise import Options

_BATCH = 4096  # tokens in memory at a time


@dataclass(slots=True)
class Windows:
    """Token ids, int64 [samples, length]: pieces of the text, each after BOS if there is one."""

    ids: Tensor

    @classmethod
    def draw(cls, source: Source, path: str | Path | None, options: Options) -> Windows:
        """Draw windows that begin anywhere in the text; the same seed draws the same.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no text, no tokenizer, or fewer tokens than one window.
        """
        if path is None:
            raise ValueError(f"method {options.method!r} needs calibration text: give --calib FILE")
        words = tokenizer.load(source)
        if words is None:
            raise ValueError(f"{source.path}: has no tokenizer, which calibration text needs")
        ids = words.encode(read_text(Path(path)), special=False)
        bos = [] if source.spec.bos is None else [source.spec.bos]
        body = options.length - len(bos)
        if len(ids) < body:
            raise ValueError(f"{path}: has {len(ids)} tokens, fewer than one window of {body}")
        if options.length > source.spec.max_context:
            raise ValueError(
                f"length must be at most the model's {source.spec.max_context} tokens, got "
                f"{options.length}"
            )
        generator = torch.Generator().manual_seed(options.seed)
        starts = torch.randint(0, len(ids) - body + 1, (options.samples,), generator=generator)
        if max(ids) >= source.spec.vocab:
            raise ValueError(f"{path}: token {max(ids)} is outside the model's {source.spec.vocab}")
        return cls(torch.tensor([bos + ids[s : s + body] for s in starts.tolist()]))


def read_text(path: Path) -> str:
    """Plain text, or the fields "text" of JSON lines, an empty line between two.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, or a line of .jsonl that is no object with a text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected calibration text")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return text
        return "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, or JSON lines with a field 'text' ({error})"
        ) from None


class LayerRun(reference.Decoder):
    """One layer over all windows; what goes in and out lies in files in `folder`.

    Args:
        spec: the model.
        index: of the layer.
        windows: calibration text; None for methods that need none.
        folder: for the files, [samples, length, hidden] float32.
        read: tensor by name.
        first: what each layer reads of the windows' first tokens where those will be stored
            (`sinks`), float32 [layers + 1, samples, hidden], NaN where not; None: nowhere.
    """

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        windows: Windows | None,
        folder: Path,
        read: Callable[[str], Tensor],
        first: Tensor | None = None,
    ) -> None:
        self._first = first
        self.spec, self.index, self.folder, self.windows = spec, index, folder, windows
        if windows is None:
            return
        self._rope = RopeTable(spec.rope, spec.head_dim, torch.float32)
        samples, length = windows.ids.shape
        self._rows = max(1, _BATCH // length)
        self._angles = self._rope.rows(0, length, length=length)
        self._causal = self._mask(0, length)
        folder.mkdir(parents=True, exist_ok=True)
        if index == 0 and not self._file(0).is_file():
            table = read("embed_tokens.weight").float()
            with self._writing(self._file(0), spec.hidden) as out:
                for at in range(samples):
                    out[at] = F.embedding(windows.ids[at], table) * spec.embed_scale
        self._x = self._open(self._file(index), spec.hidden)
        self._attended = self._mid = None

    def _file(self, index: int) -> Path:
        return self.folder / f"hidden-{index}.bin"

    def _open(self, path: Path, width: int, mode: str = "c") -> Tensor:
        shape = (*self.windows.ids.shape, width)
        return torch.from_numpy(np.memmap(path, np.float32, mode, shape=shape))

    def _writing(self, path: Path, width: int) -> _Whole:
        return _Whole(path, lambda p: self._open(p, width, "w+"))

    def _batches(self) -> range:
        return range(0, len(self.windows.ids), self._rows)

    @torch.inference_mode()
    def inputs(self, layer: Layer, part: str, see: Callable[[Tensor], None]) -> None:
        """Call `see` with the inputs [sequences, length, columns] of one matrix, in batches.

        Parts are asked for in the order of `quantise.PARTS`, those before quantised in `layer`.
        """
        spec = self.spec
        if part == "qkv":
            for at in self._batches():
                see(self._norm(self._x[at : at + self._rows], layer.attention_norm))
        elif part == "output":
            width = spec.heads * spec.head_dim
            with self._writing(self.folder / "attended.bin", width) as out:
                for at in self._batches():
                    out[at : at + self._rows] = self._attend(layer, at)
                    see(out[at : at + self._rows])
            self._attended = self._open(self.folder / "attended.bin", width)
        elif part == "gate_up":
            with self._writing(self.folder / "middle.bin", spec.hidden) as out:
                for at in self._batches():
                    rows = slice(at, at + self._rows)
                    added = F.linear(self._attended[rows], layer.output)
                    out[rows] = torch.add(self._x[rows], added, alpha=spec.residual_scale)
                    see(self._norm(out[rows], layer.ffn_norm))
            self._mid = self._open(self.folder / "middle.bin", spec.hidden)
        else:
            for at in self._batches():
                see(self._gated(layer, self._mid[at : at + self._rows]))

    def _attend(self, layer: Layer, at: int) -> Tensor:
        spec, (_, length) = self.spec, self.windows.ids.shape
        arena = torch.empty(2, spec.kv_heads, length, spec.head_dim)
        outputs = [
            self._attention(layer, x, arena, 0, *self._angles, self._causal)
            for x in self._x[at : at + self._rows]
        ]
        return torch.stack(outputs)

    def _gated(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = F.linear(self._norm(x, layer.ffn_norm), layer.gate_up).chunk(2, -1)
        return F.silu(gate) * up

    @torch.inference_mode()
    def finish(self, layer: Layer) -> None:
        """Write what the quantised layer lets through, the next one's input."""
        with self._writing(self._file(self.index + 1), self.spec.hidden) as out:
            for at in self._batches():
                rows = slice(at, at + self._rows)
                added = F.linear(self._gated(layer, self._mid[rows]), layer.down)
                out[rows] = torch.add(self._mid[rows], added, alpha=self.spec.residual_scale)
            if self._first is not None:
                exact = self._first[self.index + 1]
                out[:, 0] = torch.where(exact.isnan(), out[:, 0], exact)

    def forget(self) -> None:
        """Remove this layer's input: the next one's is there."""
        if self.windows is not None:
            self._file(self.index).unlink(missing_ok=True)


class _Whole:
    """A file that has its name only once it is whole; large ones, so nothing is copied."""

    def __init__(self, path: Path, make: Callable[[Path], Tensor]) -> None:
        self._path, self._part, self._make = path, path.with_suffix(".part"), make

    def __enter__(self) -> Tensor:
        return self._make(self._part)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.replace(self._part, self._path)
