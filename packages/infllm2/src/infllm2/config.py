"""What the algorithm is told: sizes of kernels and blocks, and how many blocks a token visits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# The coarse level pools four times wider than the fine one (128 / 64 against 32 / 16 in the paper).
COARSE_FACTOR = 4


@dataclass(frozen=True)
class InfLLMv2Config:
    """Sizes of InfLLM v2, with the values MiniCPM4 was trained with (arXiv 2509.24663, section
    4.1).

    **Which blocks a token visits.** The token at position t lies in block b = t // block_size. It
    visits

        {0 … init_blocks − 1}  ∪  {b − W + 1 … b}  ∪  the best-scored others,   W = window_size //
        block_size,

    restricted to 0 … b, and `budget = topk + W` blocks in all (every block 0 … b while there are no
    more than that). So the window is *not* part of `topk`, the initial blocks are, and the current,
    still incomplete block is the last of the W window blocks: 64 + 32 = 96 blocks are 1 initial, 32
    of the window and 63 chosen ones, the paper's split. (The released kernels force one window
    block more and choose one fewer: the window is then 33 blocks.)

    Args:
        kernel_size: tokens averaged into one fine compressed key (l1); a multiple of
            `kernel_stride`.
        kernel_stride: tokens between two fine compressed keys (s1).
        block_size: tokens per block (B); a multiple of `kernel_stride`.
        init_blocks: blocks at the start of the sequence that every token visits; 0 … `topk`.
        window_size: length of the local window in tokens; a positive multiple of `block_size`.
        topk: blocks visited besides the window, initial blocks included; at least 1.
        dense_len: sequences shorter than this many keys use dense attention; −1: never; "auto":
            from where on sparse attention is the faster one on this machine, measured at the first
            call with a shape (`infllm2.switch`, about a second).
        use_nope: score with keys and queries before rotary embedding, which the caller passes.
        lse: normalise scores by the log-sum-exp over the coarse kernels ("approx", a quarter of the
            work, section 3.3) or over the fine ones ("exact").
        compat: `None` counts positions absolutely, so the blocks of a token do not depend on how
            its prompt was chunked. "official" chooses as the released kernels do, whose frontier
            depends on the chunk and whose window is one block longer (`infllm2.official`).

    Raises:
        ValueError: a value is out of range.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    init_blocks: int = 1
    window_size: int = 2048
    topk: int = 64
    dense_len: int | Literal["auto"] = 8192
    use_nope: bool = False
    lse: Literal["approx", "exact"] = "approx"
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        for name in ("kernel_size", "kernel_stride", "block_size", "window_size", "topk"):
            _check_int(name, getattr(self, name), least=1)
        _check_int("init_blocks", self.init_blocks, least=0)
        if self.dense_len != "auto":
            _check_int("dense_len", self.dense_len, least=-1, also=' or "auto"')
        for name, divisor in (
            ("kernel_size", "kernel_stride"),
            ("block_size", "kernel_stride"),
            ("window_size", "block_size"),
        ):
            value, step = getattr(self, name), getattr(self, divisor)
            if value % step:
                raise ValueError(
                    f"{name} must be a multiple of {divisor}, got {name}={value} with "
                    f"{divisor}={step}: use {max(1, round(value / step)) * step}"
                )
        if self.init_blocks > self.topk:
            raise ValueError(
                f"init_blocks must not exceed topk, which counts them, got "
                f"init_blocks={self.init_blocks} with topk={self.topk}: raise topk"
            )
        if self.lse not in ("approx", "exact"):
            raise ValueError(f'lse must be "approx" or "exact", got {self.lse!r}')
        if self.compat not in (None, "official"):
            raise ValueError(f'compat must be None or "official", got {self.compat!r}')
        if self.compat == "official" and self.init_blocks >= self.topk:
            raise ValueError(
                'compat="official" forces one window block more, so topk must exceed init_blocks, '
                f"got topk={self.topk} with init_blocks={self.init_blocks}"
            )
        if not isinstance(self.use_nope, bool):
            raise ValueError(f"use_nope must be True or False, got {self.use_nope!r}")

    @property
    def window_blocks(self) -> int:
        """Blocks of the local window, the current one included (W)."""
        return self.window_size // self.block_size

    @property
    def budget(self) -> int:
        """Largest number of blocks one token visits: `topk + window_blocks` (96 as trained)."""
        return self.topk + self.window_blocks

    @classmethod
    def from_pretrained_config(cls, sparse_config: Mapping[str, Any]) -> InfLLMv2Config:
        """Read the `sparse_config` entry of a MiniCPM4 `config.json`.

        Args:
            sparse_config: a mapping of this class's field names, the whole `config.json` as a
                mapping, or an object with a `sparse_config` attribute (a transformers
                configuration).

        Raises:
            ValueError: no such entry, an unknown field, or a value out of range.
        """
        entry = getattr(sparse_config, "sparse_config", sparse_config)
        if isinstance(entry, Mapping):  # a whole config.json holds it too
            entry = entry.get("sparse_config", entry)
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"sparse_config must be a mapping such as MiniCPM4's config.json holds, got "
                f"{type(entry).__name__}: pass the entry, or build InfLLMv2Config(...) directly"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(entry) - known)
        if unknown:
            raise ValueError(
                f"sparse_config has unknown fields {unknown}: expected some of {sorted(known)}"
            )
        return cls(**entry)


def _check_int(name: str, value: object, *, least: int, also: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}{also}, got {value!r}")
