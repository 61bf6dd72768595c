"""Where derived files are kept, and how two processes that want the same one take turns."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """The folder for derived files: $TESTBED_CACHE, $XDG_CACHE_HOME/minicpm4/testbed or ~/.cache/….

    It is read on each call and not created here.
    """
    if own := os.environ.get("TESTBED_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification: a relative path is to be ignored.
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "minicpm4" / "testbed"


@contextmanager
def turn(name: str) -> Iterator[None]:
    """Hold the cache's lock `name`; wait while another process holds it.

    The lock is the kernel's: it ends with its process, so a killed one blocks nobody.
    """
    from filelock import FileLock, Timeout

    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("waiting for another process that is preparing %s", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
