"""How many threads compute, and how many of PyTorch's inside a call of the engine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpmcu._torch import torch


def cores() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default() -> int:
    """The threads to take where nobody says how many: PyTorch's number where it is there already,
    else OMP_NUM_THREADS, else one for each physical core.
    """
    if sys.modules.get("torch") is not None:
        return torch.get_num_threads()
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    return _physical_cores()


def _physical_cores() -> int:
    """Cores that this process may run on: the threads of one core share what multiplies."""
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        found = {Path(siblings.format(i)).read_text() for i in os.sched_getaffinity(0)}
    except (OSError, AttributeError):  # not Linux
        return cores()
    return len(found)


def resolve(wanted: int | None) -> int | None:
    """A valid number of threads (None: `default`'s); above the cores those, and a warning.

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
    """Run the block with `count` of PyTorch's threads, then restore its number."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
