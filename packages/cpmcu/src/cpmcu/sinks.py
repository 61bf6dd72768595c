"""Exact keys and values of a sequence's first token, stored with quantised weights.

At position 0 a token sees only itself: its keys and values depend on nothing else. And models rest
much of their attention on it (attention sinks, arXiv 2309.17453), by activations hundreds of times
as large as any other token's, which rounded matrices reproduce worst. So for the tokens that
sequences begin with they are computed once, by the unrounded weights, and stored. MiniCPM4's P-GPTQ
does so (arXiv 2506.07900, section 4.1.2), after PrefixQuant (arXiv 2410.05265).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpmcu import dtypes, int8_rows, tokenizer
from cpmcu._files import atomic_path
from cpmcu._torch import torch
from cpmcu.safetensors_file import SafetensorsFile, write

if TYPE_CHECKING:
    from cpmcu.backends import Decoder
    from cpmcu.cache import KVCache
    from cpmcu.loader import Source
    from cpmcu.spec import ModelSpec

FILE = "sinks.safetensors"
IDS, ROWS = "token_ids", "keys_values"


@dataclass(frozen=True, slots=True, eq=False)
class Sinks:
    """What is stored.

    Attributes:
        ids: first tokens.
        rows: float32 [len(ids), layers, 2, kv_heads, head_dim], keys (rotated) and values.
    """

    ids: tuple[int, ...]
    rows: np.ndarray

    def __contains__(self, token: int) -> bool:
        return token in self.ids

    def put(self, token: int, cache: KVCache) -> None:
        """Write the token's keys and values over those at the cache's first position."""
        rows = self.rows[self.ids.index(token)]
        if cache.dtype == "int8":
            rows = int8_rows.of_floats(rows)
        rows = dtypes.of_floats(rows, cache.dtype)
        with nullcontext() if cache.device is None else torch.inference_mode():
            for arena, row in zip(cache.layers, rows, strict=True):
                arena[:, :, 0] = row if cache.device is None else dtypes.to_torch(row, cache.dtype)

    def save(self, path: Path) -> None:
        """Write them, whole or not at all."""
        tensors = {IDS: ("int64", np.array(self.ids, np.int64)), ROWS: ("float32", self.rows)}
        with atomic_path(path) as target:
            write(target, tensors, {"format": "cpmcu sinks 1"})

    @classmethod
    def load(cls, path: Path, spec: ModelSpec) -> Sinks:
        """Read them.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: the file is damaged, or of another model.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, and config.json names it: copy it too")
        file = SafetensorsFile(path)
        count = file.tensors[IDS].shape[0] if IDS in file.tensors else 0
        shape = count, spec.layers, 2, spec.kv_heads, spec.head_dim
        for name, kind, wanted in ((IDS, "I64", (count,)), (ROWS, "F32", shape)):
            info = file.tensors.get(name)
            if info is None or (info.dtype, info.shape) != (kind, wanted):
                got = "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
                raise ValueError(f"{path}: '{name}' must be {kind} {list(wanted)}, got {got}")
        ids, rows = file.array(IDS), file.array(ROWS).copy()
        if not np.isfinite(rows).all() or ((ids < 0) | (ids >= spec.vocab)).any():
            raise ValueError(f"{path}: holds numbers that are not finite, or unknown tokens")
        return cls(tuple(ids.tolist()), rows)


class FromSinks:
    """A decoder whose sequences begin with what `sinks` holds, if it holds their first token."""

    def __init__(self, inner: Decoder, sinks: Sinks) -> None:
        self._inner, self._sinks = inner, sinks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def forward(self, tokens: Any, cache: KVCache, *, length: int = 0, every: bool = False) -> Any:
        """As the decoder's own."""
        if cache.length or int(tokens[0]) not in self._sinks:
            return self._inner.forward(tokens, cache, length=length, every=every)
        length, more = max(length, len(tokens)), len(tokens) > 1
        if every or not more:
            first = self._inner.forward(tokens[:1], cache, length=length, every=every)
        else:  # no one asks for what follows the first token
            cache.reserve(1)
            cache.length = 1
        self._sinks.put(int(tokens[0]), cache)
        if not more:
            return first
        rest = self._inner.forward(tokens[1:], cache, length=length, every=every)
        if not every:
            return rest
        return np.concatenate([first, rest]) if cache.device is None else torch.cat([first, rest])


def first_tokens(source: Source) -> list[int]:
    """Tokens that sequences of a model begin with: BOS, and what its chat template begins with."""
    found = [] if source.spec.bos is None else [source.spec.bos]
    words = tokenizer.load(source)
    if words is not None:
        found += words.prefix
        try:
            found += words.chat([{"role": "user", "content": "a"}])[:1]
        except ValueError:  # it has no template, or one that wants another conversation
            pass
    return list(dict.fromkeys(found))


def load(source: Source) -> Sinks | None:
    """Those of a quantised folder whose config.json says that it has some; else None.

    Raises:
        FileNotFoundError, ValueError: as `Sinks.load`.
    """
    return Sinks.load(source.path / FILE, source.spec) if source.has_sinks else None
