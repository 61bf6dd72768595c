"""Run the steps of a pipeline: skip what is done, resume what was killed, keep what is finished.

A step works in `<name>.work`. When its function returns, the manifest is written there and the
folder is renamed to `<name>`: so `<name>` is always complete, and `<name>.work` is always the
remains of a step that did not end, which the same step may go on from.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm4._cli import USER_ERRORS
from minicpm4._files import sha256, write_json
from minicpm4.pipeline.config import Pipeline, Step, is_path
from minicpm4.pipeline.manifest import (
    difference,
    fingerprint,
    hash_input,
    output_hashes,
    read_manifest,
    write_manifest,
)
from minicpm4.pipeline.stage import Workspace

MARKS = "fingerprint.json"


@dataclass(frozen=True)
class State:
    """What `run` would do with a step now."""

    action: str  # "skip", "run", "resume" or "rerun"
    reason: str
    marks: dict[str, Any] | None  # None while an input has yet to be made


class Runner:
    """One pipeline over one run folder.

    Args:
        pipeline: what to run.
        out: the run folder; each step's results are in `out/<step>`.
        report: called with (step name, text, share done in 0..1 or None) as steps progress.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        out: Path,
        report: Callable[[str, str, float | None], None] = lambda step, text, done: None,
    ) -> None:
        self.pipeline = pipeline
        self.out = out
        self.report = report
        self._made: dict[str, str] = {}  # "step.artefact" -> hash, for the steps known to be done

    # What is to do -------------------------------------------------------------------------

    def folder(self, step: Step) -> Path:
        """Where a finished step's results are."""
        return self.out / step.name

    def work_folder(self, step: Step) -> Path:
        """Where an unfinished step works."""
        return self.out / f"{step.name}.work"

    def state(self, step: Step) -> State:
        """Decide what `run` would do with `step`, given the state of the steps before it."""
        missing = [o for o in step.origins.values() if not is_path(o) and o not in self._made]
        manifest = read_manifest(self.folder(step))
        if missing:
            makers = dict.fromkeys(origin.partition(".")[0] for origin in missing)
            return State("run", f"after {', '.join(makers)}", None)
        hashes = {n: hash_input(step, n, o, self._made) for n, o in step.origins.items()}
        marks = fingerprint(step, self.pipeline.seed, hashes)
        if manifest is None:
            if self._work_marks(step) == marks:
                return State("resume", "was interrupted", marks)
            return State("run", "not done yet", marks)
        changed = difference(manifest["fingerprint"], marks)
        if changed:
            return State("rerun", f"changed: {changed}", marks)
        for name, relative in step.stage.outputs.items():
            path = self.folder(step) / relative
            if not path.exists() or sha256(path) != manifest["outputs"].get(name):
                return State("rerun", f"{path} is missing or was altered", marks)
        return State("skip", f"done in {manifest['seconds']:.0f} s", marks)

    def _work_marks(self, step: Step) -> dict[str, Any] | None:
        try:
            return json.loads((self.work_folder(step) / MARKS).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def _remember(self, step: Step) -> None:
        manifest = read_manifest(self.folder(step))
        assert manifest is not None
        for name, value in manifest["outputs"].items():
            self._made[f"{step.name}.{name}"] = value

    def states(self) -> list[tuple[Step, State]]:
        """The state of every step, in order, without changing anything."""
        self._made.clear()
        result = []
        for step in self.pipeline.steps:
            state = self.state(step)
            if state.action == "skip":
                self._remember(step)
            result.append((step, state))
        return result

    # Doing it ------------------------------------------------------------------------------

    def run(self, *, start: str | None = None, only: str | None = None) -> None:
        """Run what is not done.

        Args:
            start: run this step and all after it again, even if done.
            only: run just this step, again even if done; what it needs must be done.

        Raises:
            ValueError, FileNotFoundError, ImportError: the user's to mend; finished steps are kept.
        """
        first = self.pipeline.step(start).name if start else None
        single = self.pipeline.step(only).name if only else None
        forced = False
        for step in self.pipeline.steps:
            step.stage.check(step.config)
        with self._lock():
            self._made.clear()
            for step in self.pipeline.steps:
                forced = forced or step.name == first
                state = self.state(step)
                if single is not None and step.name != single:
                    if state.action == "skip":
                        self._remember(step)
                    continue
                if state.marks is None:
                    raise ValueError(
                        f"stage {step.name!r} comes {state.reason}, which is not done: run the "
                        f"whole pipeline first (minicpm4 run {self.pipeline.source})"
                    )
                if state.action == "skip" and not forced and single is None:
                    self.report(step.name, f"up to date, {state.reason}", 1.0)
                else:
                    self._execute(step, state.marks)
                self._remember(step)

    def _execute(self, step: Step, marks: dict[str, Any]) -> None:
        work, final = self.work_folder(step), self.folder(step)
        if self._work_marks(step) != marks:
            # Remains of another configuration are of no use to this one.
            shutil.rmtree(work, ignore_errors=True)
        inputs = {name: self._input_path(origin) for name, origin in step.origins.items()}
        self._check_space(step, inputs)
        work.mkdir(parents=True, exist_ok=True)
        write_json(work / MARKS, marks)
        began = time.monotonic() - _spent(work)
        space = Workspace(
            work,
            self.pipeline.seed,
            self.pipeline.threads,
            f"minicpm4 run {self.pipeline.source}",
            lambda text, done: self.report(step.name, text, done),
        )
        try:
            with _ticking(work, began):
                step.stage.run(step.config, inputs, space)
            outputs = output_hashes(step, work)
        except USER_ERRORS as error:
            # The mend changes the fingerprint: this work could not be resumed, so leave none.
            shutil.rmtree(work, ignore_errors=True)
            kind = next(k for k in USER_ERRORS if isinstance(error, k))
            raise kind(
                f"stage {step.name!r}: {str(error).rstrip('.')}. "
                f"Finished stages are kept; then: minicpm4 run {self.pipeline.source}"
            ) from error
        except Exception as error:
            # Libraries wrap a full disk in errors of their own; the user needs to know just that.
            if "No space left on device" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device", str(work)) from error
            raise
        seconds = time.monotonic() - began
        write_manifest(step, work, marks, outputs, seconds)
        for leftover in (MARKS, "seconds"):
            (work / leftover).unlink(missing_ok=True)
        shutil.rmtree(work / "steps", ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(work, final)
        self.report(step.name, f"done in {seconds:.0f} s", 1.0)

    def _input_path(self, origin: str) -> Path:
        if is_path(origin):
            return Path(origin).expanduser()
        maker, _, artefact = origin.partition(".")
        step = self.pipeline.step(maker)
        return self.folder(step) / step.stage.outputs[artefact]

    def _check_space(self, step: Step, inputs: dict[str, Path]) -> None:
        need = step.stage.estimate(step.config, inputs).disk_bytes
        existing = next(p for p in [self.out, *self.out.absolute().parents] if p.exists())
        free = shutil.disk_usage(existing).free
        if free < need:
            raise ValueError(
                f"stage {step.name!r} needs about {need / 1e6:.0f} MB in {self.out}, "
                f"but {free / 1e6:.0f} MB are free: free some space, or choose another --out"
            )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the run folder, so that two runs do not work in it at once."""
        self.out.mkdir(parents=True, exist_ok=True)
        lock_file = self.out / ".lock"
        with lock_file.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"{self.out} is in use by another run: wait for it, or choose another --out"
                ) from None
            try:
                yield
            finally:
                # A run that failed before it made anything leaves no folder behind.
                if [p.name for p in self.out.iterdir()] == [".lock"]:
                    lock_file.unlink()
                    self.out.rmdir()


def _spent(work: Path) -> float:
    """Seconds that earlier, interrupted attempts at this step worked."""
    try:
        return float((work / "seconds").read_text())
    except (FileNotFoundError, ValueError):
        return 0.0


@contextmanager
def _ticking(work: Path, began: float) -> Iterator[None]:
    """Keep the time spent on disk, so that a killed step's seconds are not lost from the report."""
    from threading import Event, Thread

    stop = Event()

    def tick() -> None:
        while not stop.wait(1.0):
            (work / "seconds").write_text(f"{time.monotonic() - began:.3f}")

    thread = Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
