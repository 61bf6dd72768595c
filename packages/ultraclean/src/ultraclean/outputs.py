"""The outputs of a filter under way, and the record of how far they are good.

Outputs are called `*.partial` until all is done. Every second or so they are flushed to disk and
`progress.json` records how many blocks of which input are done and how long each output then was;
a thread does so, since a disk may take longer than the work. A killed run cuts the outputs back to
the record and goes on, so that its outputs are byte for byte those of an uninterrupted run.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ultraclean._files import remove_abandoned, write_json
from ultraclean.report import FilterReport

if TYPE_CHECKING:
    from ultraclean.jsonl_format import JsonLines
    from ultraclean.parquet_format import Parquet

STREAMS = ("kept", "rejected", "malformed")
# A save begins this long after the last, or when that has ended; past the second bound the work
# waits for it. A kill loses what was done since the last save that ended began: some two seconds,
# and on a slow disk at most twice the second bound.
SAVE_SECONDS, MOST_SECONDS = 1.0, 2.4

Job = dict[str, Any]
"""What decides the outputs, as JSON holds it; `inputs` is a list of [path, bytes, mtime in ns]."""


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Make the folder, and hold it against another process that would write the same files.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is writing into {folder}: wait for it, or choose another folder"
            ) from None
        yield
    finally:
        os.close(descriptor)  # which ends the lock, as a kill does


def finished(folder: Path, job: Job, suffix: str) -> FilterReport | None:
    """The report of an equal job that is done; None if there is none.

    Raises:
        ValueError: the folder holds something that this job did not write.
    """
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        other = report.pop("job")
        found = FilterReport(**report)
    except FileNotFoundError:
        mine = (folder / "progress.json").exists()
        taken = [name for name in STREAMS if (folder / f"{name}{suffix}").exists()]
        if taken and not mine:
            raise ValueError(
                f"{folder}/{taken[0]}{suffix} is not ours (there is no report.json): choose "
                "another output folder"
            ) from None
        return None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/report.json is broken ({error}): remove the folder") from None
    if other != job:
        raise ValueError(
            f"{folder} holds the result of another call ({_difference(other, job)}): choose "
            "another output folder, or replace it with resume=False (--restart)"
        )
    for name in ("progress.json", "report.json"):  # a kill may have come just before the end
        remove_abandoned(folder / name)
    (folder / "progress.json").unlink(missing_ok=True)
    return found


def clear(folder: Path) -> None:
    """Remove what a run wrote, finished or not, and nothing else."""
    try:
        whole = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        suffix = whole["job"]["suffix"]
        names = [f"{stream}{suffix}" for stream in STREAMS]
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        names = []
    for name in ("report.json", *names, "progress.json", *(f"{s}.partial" for s in STREAMS)):
        (folder / name).unlink(missing_ok=True)


class Outputs:
    """The three outputs, opened where the last record leaves off.

    Args:
        folder: where they are.
        job: what they are the outputs of.
        form: the format: what an output begins with, and how it gets its name.

    Attributes:
        file, block: work goes on after this many blocks of the input of that index.
        report: what has been counted so far.
        resumed: is there anything from an earlier run?

    Raises:
        ValueError: the folder holds unfinished work of another job.
    """

    def __init__(self, folder: Path, job: Job, form: JsonLines | Parquet) -> None:
        self.folder, self.job, self._form = folder, job, form
        self.report = FilterReport()
        self.file, self.block = 0, 0
        self._out: dict[str, BinaryIO] = {}
        lengths = dict.fromkeys(STREAMS, 0)
        state = self._load()
        self.resumed = state is not None
        self.complete = state is not None and state["complete"]
        if state is not None:
            self.report = FilterReport(**state["report"])
            self.file, self.block, lengths = state["file"], state["block"], state["lengths"]
        self._saved = time.monotonic()
        self._saver = ThreadPoolExecutor(1, "ultraclean-saver")
        self._saving: Future[None] | None = None
        if self.complete:
            return
        for name in STREAMS:
            stream = self.partial(name).open("r+b" if self.partial(name).exists() else "w+b")
            stream.truncate(lengths[name])
            stream.seek(lengths[name])
            if not lengths[name]:
                stream.write(form.header())
            self._out[name] = stream

    def partial(self, name: str) -> Path:
        """Where an output grows."""
        return self.folder / f"{name}.partial"

    def _load(self) -> dict[str, Any] | None:
        try:
            state = json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.folder}/progress.json is broken ({error}): start over with resume=False "
                "(--restart)"
            ) from None
        if state["job"] != self.job:
            raise ValueError(
                f"{self.folder} holds unfinished work of another call "
                f"({_difference(state['job'], self.job)}): finish that one, choose another output "
                "folder, or start over with resume=False (--restart)"
            )
        if not state["complete"]:
            for name in STREAMS:
                path = self.partial(name)
                if not path.exists() or path.stat().st_size < state["lengths"][name]:
                    raise ValueError(
                        f"{path} is shorter than progress.json says: start over with resume=False "
                        "(--restart)"
                    )
        return state

    def write(self, stream: str, data: bytes) -> None:
        """Append."""
        self._out[stream].write(data)

    def advance(self, file: int, block: int) -> None:
        """All blocks before this one are written; save, if the last time is long enough ago."""
        self.file, self.block = file, block
        since = time.monotonic() - self._saved
        if since < SAVE_SECONDS:
            return
        if self._saving is not None and not self._saving.done() and since < MOST_SECONDS:
            return
        self._wait()
        self._saving = self._saver.submit(self._save, self._state(complete=False))
        self._saved = time.monotonic()

    def _state(self, complete: bool) -> dict[str, Any]:
        for stream in self._out.values():
            stream.flush()
        return {
            "job": self.job,
            "complete": complete,
            "file": self.file,
            "block": self.block,
            "lengths": {name: stream.tell() for name, stream in self._out.items()},
            "report": self.report.to_dict(),
        }

    def _save(self, state: dict[str, Any]) -> None:
        for stream in self._out.values():  # which may be longer by now
            os.fsync(stream.fileno())
        write_json(self.folder / "progress.json", state)

    def _wait(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def finish(self) -> FilterReport:
        """Give the outputs their names and write `report.json`; a kill in between is made good."""
        report = self.report.ordered()
        assert report.total == report.kept + report.rejected + report.malformed
        if not self.complete:
            self._wait()
            self._save(self._state(complete=True))
            self.close()
        for name in STREAMS:
            if self.partial(name).exists():  # or it was renamed before a kill
                self._form.finish(self.partial(name), self.folder / f"{name}{self._form.suffix}")
        write_json(self.folder / "report.json", {"job": self.job, **report.to_dict()})
        (self.folder / "progress.json").unlink()
        return report

    def close(self) -> None:
        """Close the files; what was not saved is written again by the next run."""
        self._saver.shutdown()
        for stream in self._out.values():
            stream.close()


def _difference(theirs: Job, ours: Job) -> str:
    """Which settings differ, by name."""
    names = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
    return "other " + ", ".join(names)
