"""How many threads PyTorch uses inside a call of the engine, and only there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def cores() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resolve(wanted: int | None) -> int | None:
    """A valid number of threads (None: PyTorch's own); above the cores those, and a warning.

    More threads than cores wait for one another at the end of every product.
    """
    if wanted is None:
        return None
    if wanted < 1:
        raise ValueError(f"threads must be at least 1, got {wanted}")
    if wanted > cores():
        message = "threads=%d lowered to the %d cores this process may use"
        logging.getLogger("cpmcu").warning(message, wanted, cores())
    return min(wanted, cores())


@contextmanager
def using(count: int | None) -> Iterator[None]:
    """Run the block with `count` threads, then restore PyTorch's number."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
