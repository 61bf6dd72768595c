"""Tokens on disk, and batches of them as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minicpm4._files import atomic_path, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TokenData:
    """A stream of tokens in one file, memory-mapped, and how many bytes of text it stands for.

    Args:
        folder: what `pack` wrote.

    Raises:
        FileNotFoundError: the folder holds no tokens.
    """

    def __init__(self, folder: Path) -> None:
        import json

        try:
            facts = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
            self.tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} holds no packed tokens ({error.filename} is missing): make it with "
                "minicpm4.data.pack"
            ) from None
        self.bytes = int(facts["bytes"])

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def batch(self, seed: int, step: int, size: int, length: int) -> np.ndarray:
        """Random windows, int64 `[size, length + 1]`: the same for the same seed and step.

        A run that resumes therefore needs no reader state, and two runs that share seed and steps
        see the same text.

        Raises:
            ValueError: fewer than `length + 1` tokens.
        """
        last = len(self.tokens) - length - 1
        if last < 0:
            raise ValueError(
                f"the data hold {len(self.tokens)} tokens, fewer than one window of {length + 1}: "
                "give more text or a shorter length"
            )
        # Philox takes (seed, step) as its key: no two steps share a stream.
        # Typed, because a plain list with a number beyond int64 goes through float and loses bits.
        key = np.array([seed % 2**64, step], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        starts = generator.integers(0, last + 1, size)
        return np.stack([self.tokens[s : s + length + 1] for s in starts]).astype(np.int64)

    def windows(self, count: int, size: int, length: int) -> Iterable[np.ndarray]:
        """`count` evenly spread windows in batches of `size`, int64 `[<= size, length + 1]`."""
        last = len(self.tokens) - length - 1
        if last < 0:
            raise ValueError(f"{len(self.tokens)} tokens are fewer than a window of {length + 1}")
        starts = np.unique(np.linspace(0, last, count).astype(np.int64))
        for at in range(0, len(starts), size):
            chunk = starts[at : at + size]
            yield np.stack([self.tokens[s : s + length + 1] for s in chunk]).astype(np.int64)


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, folder: Path) -> TokenData:
    """Encode texts into one stream, each ended by the end token, and write it atomically.

    Raises:
        ValueError: no text at all.
    """
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    pieces, size = [], 0
    for text in texts:
        pieces.append(np.array([*tokenizer(text)["input_ids"], tokenizer.eos_token_id], dtype=kind))
        size += len(text.encode())
    if not pieces:
        raise ValueError("there is no text to pack: give at least one")
    with atomic_path(folder) as target:
        target.mkdir()
        np.save(target / "tokens.npy", np.concatenate(pieces))
        write_json(target / "tokens.json", {"bytes": size, "texts": len(pieces)})
    return TokenData(folder)
