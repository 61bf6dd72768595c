# Copied from common/_files.py by common/sync.py: change it there.
"""Files that are either whole or absent: atomic writes and content hashes."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` if the block succeeds.

    The block may make a file or a folder there. A reader sees the old content or the new, never
    a part of it; after an exception nothing is left behind, and what a killed process left is
    removed by the next that writes the same path. An existing folder is replaced.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(final)
    scratch, lock = _locked_scratch(final)
    target = scratch / final.name
    try:
        yield target
        if target.is_dir():
            # rename(2) refuses to replace a folder that is not empty: move the old one aside first.
            for file in target.rglob("*"):
                _fsync(file)
            if final.exists():
                os.replace(final, scratch / "replaced")
        else:
            _fsync(target)
        os.replace(target, final)
        _fsync(final.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def remove_abandoned(path: str | os.PathLike[str]) -> None:
    """Remove what killed processes left of their writing of `path`; live ones are not touched."""
    final = Path(path)
    for scratch in final.parent.glob(f"{glob.escape(f'.{final.name}.')}*.partial"):
        try:
            lock = os.open(scratch, os.O_RDONLY)
        except FileNotFoundError:  # its owner was just done
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(scratch, ignore_errors=True)
        except BlockingIOError:  # its owner is alive
            pass
        finally:
            os.close(lock)


def _locked_scratch(final: Path) -> tuple[Path, int]:
    """A new folder beside `final`, and the lock that says its owner lives: a kill ends the lock."""
    while True:
        scratch = Path(
            tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent)
        )
        try:
            lock = os.open(scratch, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if scratch.exists():  # nobody took it for abandoned before the lock was ours
            return scratch, lock
        os.close(lock)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as target:
        target.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, or of a folder's relative file names and contents, in name order."""
    root = Path(path)
    if root.is_file():
        with root.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted(p for p in root.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(root).as_posix()}\0{sha256(file)}\n".encode())
    return digest.hexdigest()
