"""What a strategy asks of the network: who am I, how many are we, exchange these tensors.

One primitive serves every strategy: the hop of a ring, the all-to-all of Ulysses, the passing of
APB, the gathering of partial attentions in decoding. Shapes follow from the plan, so nothing but
the tensors themselves travels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor


class Pending(Protocol):
    """An exchange under way."""

    def wait(self) -> dict[int, Tensor]:
        """Block until everything arrived; tensors by the rank that sent them."""
        ...


class Host(Protocol):
    """One host's end of the network.

    Attributes:
        rank, size: 0-based place, and number of hosts.
        bytes_sent: payload that left this host since it was made.
        messages_sent: tensors that did.
    """

    rank: int
    size: int
    bytes_sent: int
    messages_sent: int

    def exchange(
        self,
        sends: Mapping[int, Tensor],
        receives: Mapping[int, tuple[int, ...]],
        like: Tensor,
    ) -> Pending:
        """Start sending and receiving, and return at once.

        sends: by destination. receives: shapes, by source, of `like`'s dtype and device. Tensors
        without elements are not sent at all and arrive as empty ones. Between two hosts, messages
        keep their order. A tensor given to `sends` must not be written to afterwards.
        """
        ...


class Group(Protocol):
    """All hosts, or those of them that live in this process.

    Attributes:
        size: number of hosts.
        ranks: those that this process runs.
    """

    size: int
    ranks: tuple[int, ...]

    def run(self, program: Callable[[Host], Any]) -> dict[int, Any]:
        """Run the program on every host of this process; results by rank."""
        ...
