"""Sizes of InfLLM v2 sparse attention (arXiv 2509.24663), as a model's `config.json` has them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from cpmcu._fields import Fields

# Coarse kernels pool four times wider than fine ones: 128 / 64 tokens against 32 / 16 as trained.
COARSE_FACTOR = 4


@dataclass(frozen=True, slots=True)
class SparseAttention:
    """A token at position t attends to all keys as long as it sees fewer than `dense_len`; beyond,
    to the first `init_blocks` blocks, those of its window, and those with the highest scores.

    The rule looks at each token alone, so a prompt gives the same however it is cut in chunks.
    Defaults are MiniCPM4's.

    Attributes:
        kernel_size, kernel_stride: keys averaged to one compressed key, and from one to the next.
        block_size: keys of a block.
        init_blocks: blocks at the beginning that all visit.
        window_size: keys of the local window; a multiple of `block_size`.
        topk: blocks besides the window, initial ones included.
        dense_len: fewer keys than this are dense.

    Raises:
        ValueError: sizes that do not divide, or are out of range.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    init_blocks: int = 1
    window_size: int = 2048
    topk: int = 64
    dense_len: int = 8192

    def __post_init__(self) -> None:
        for name, divisor in (
            ("kernel_size", "kernel_stride"),
            ("block_size", "kernel_stride"),
            ("window_size", "block_size"),
        ):
            value, step = getattr(self, name), getattr(self, divisor)
            if step < 1 or value < step or value % step:
                raise ValueError(
                    f"sparse attention: {name} must be a positive multiple of {divisor}={step}, "
                    f"got {value}"
                )
        if not 0 <= self.init_blocks <= self.topk or self.topk < 1:
            raise ValueError(
                f"sparse attention: topk must be at least 1 and init_blocks in 0..topk, got "
                f"topk={self.topk}, init_blocks={self.init_blocks}"
            )

    @property
    def window_blocks(self) -> int:
        """Blocks of the window, a token's own included."""
        return self.window_size // self.block_size

    @property
    def budget(self) -> int:
        """Most blocks that one token visits."""
        return self.topk + self.window_blocks

    @property
    def least_keys(self) -> int:
        """Keys from which on attention is sparse; up to the budget it would visit all blocks."""
        return max(self.dense_len, self.budget * self.block_size + 1)

    def kernels(self, length: int) -> tuple[int, int]:
        """Fine and coarse kernels that are complete within `length` keys."""
        size, stride = self.kernel_size, self.kernel_stride
        return tuple(
            max(0, (length - factor * size) // (factor * stride) + 1)
            for factor in (1, COARSE_FACTOR)
        )


def from_config(config: Fields) -> SparseAttention | None:
    """The model's own sizes, or None where its `config.json` has no `sparse_config`.

    Raises:
        ValueError: an option that the engine does not have, or a size out of range.
    """
    given = config.child("sparse_config")
    if given is None:
        return None
    if given.boolean("use_nope", False):
        raise given.error("use_nope", "is true, which this engine does not implement")
    known = {field.name for field in fields(SparseAttention)}
    sizes = {name: given.integer(name, low=-1) for name in known if name in given}
    return SparseAttention(**sizes)


def resolve(wanted: str | SparseAttention, own: SparseAttention | None) -> SparseAttention | None:
    """What an engine uses: "auto" takes the model's own, "on" MiniCPM4's where it has none.

    Raises:
        ValueError: unknown.
    """
    if isinstance(wanted, SparseAttention):
        return wanted
    if wanted not in ("auto", "on", "off"):
        raise ValueError(
            f"sparse must be 'auto', 'on', 'off' or SparseAttention(...), got {wanted!r}"
        )
    if wanted == "off":
        return None
    return own or (SparseAttention() if wanted == "on" else None)
