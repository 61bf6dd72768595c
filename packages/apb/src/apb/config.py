"""How a document is divided among hosts, and how much of it they share.

n: document tokens; H: hosts; l_b: tokens of the longest block, ceil(n/H); l_a: document tokens of
the anchor; l_p: tokens that a host passes on, per KV head (arXiv 2502.12085).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lengths:
    """What an `APBConfig` comes to for one document.

    blocks: tokens of each host's block, in order, longest first; they sum to n.
    anchor: l_a, at most `blocks[0]`. passing: l_p; a block with less to offer passes less.
    """

    blocks: tuple[int, ...]
    anchor: int
    passing: int


@dataclass(frozen=True, kw_only=True, slots=True)
class APBConfig:
    """Hyper-parameters of APB (arXiv 2502.12085), refused where they make no sense.

    hosts: H, at least 1; one host is dense causal attention.
    anchor_length: l_a, 0 up to l_b; None is floor(l_b / 4). Query tokens come on top of it.
    passing_length: l_p, 0 or more; None is floor(l_b / 8). More than a block holds passes it all.
    pool_kernel: odd width of the max-pool that spreads a score to its neighbours before the
        selection, so that short phrases travel whole; 1 turns it off. The authors' code uses 5.

    Raises ValueError naming the field. What depends on the document is checked by `lengths`.
    """

    hosts: int
    anchor_length: int | None = None
    passing_length: int | None = None
    pool_kernel: int = 5

    def __post_init__(self) -> None:
        _check_integer("hosts", self.hosts, 1)
        if self.anchor_length is not None:
            _check_integer("anchor_length", self.anchor_length, 0)
        if self.passing_length is not None:
            _check_integer("passing_length", self.passing_length, 0)
        _check_integer("pool_kernel", self.pool_kernel, 1)
        if self.pool_kernel % 2 == 0:
            raise ValueError(
                f"pool_kernel must be odd, so that it is centred on a token, got "
                f"{self.pool_kernel}; use {self.pool_kernel + 1}, or 1 for no pooling"
            )

    def lengths(self, document_length: int) -> Lengths:
        """Divide a document of `document_length` tokens (at least one a host) among the hosts.

        Blocks differ by at most one token, where the authors pad the document with zeros to a
        multiple of H. Raises ValueError for a document shorter than H or an anchor longer than l_b:
        host 1 would see its own first tokens twice, and later ones before their time.
        """
        if document_length < self.hosts:
            raise ValueError(
                f"hosts={self.hosts} needs at least one document token each, got "
                f"{document_length} tokens; use hosts={max(document_length, 1)} or fewer"
            )
        short, longer = divmod(document_length, self.hosts)
        blocks = tuple(short + (host < longer) for host in range(self.hosts))
        anchor = blocks[0] // 4 if self.anchor_length is None else self.anchor_length
        if self.hosts > 1 and anchor > blocks[0]:
            raise ValueError(
                f"anchor_length={anchor} is longer than the first block of {blocks[0]} tokens "
                f"({document_length} tokens on {self.hosts} hosts); use at most {blocks[0]}"
            )
        passing = blocks[0] // 8 if self.passing_length is None else self.passing_length
        return Lengths(blocks=blocks, anchor=min(anchor, blocks[0]), passing=passing)


def _check_integer(field: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{field} must be an integer, got {value!r}; pass a whole number")
    if value < least:
        raise ValueError(f"{field} must be at least {least}, got {value}; raise it")
