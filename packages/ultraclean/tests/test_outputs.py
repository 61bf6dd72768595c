"""Saving beside the work: what a slow disk may cost, and what a failing one must say."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from ultraclean import outputs
from ultraclean.jsonl_format import JsonLines
from ultraclean.outputs import Outputs

JOB = {"inputs": [["in.jsonl", 1, 1]], "suffix": ".jsonl"}


@pytest.fixture
def work(tmp_path: Path) -> Outputs:
    return Outputs(tmp_path, JOB, JsonLines("text", "source", 1000, ""))


def recorded(work: Outputs) -> int:
    """Blocks that a killed run would go on after."""
    return json.loads((work.folder / "progress.json").read_text())["block"]


def test_a_slow_disk_is_waited_for_past_the_bound(
    work: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, disk, saved = [0.0], threading.Event(), []
    save = work._save

    def slow(state: dict) -> None:
        disk.wait()
        save(state)
        saved.append(state["block"])

    monkeypatch.setattr(outputs.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(work, "_save", slow)
    work._saved = 0.0
    work.advance(0, 1)
    assert work._saving is None  # too early
    clock[0] = outputs.SAVE_SECONDS
    work.write("kept", b"two\n")
    work.advance(0, 2)
    clock[0] += outputs.SAVE_SECONDS
    work.write("kept", b"three\n")
    work.advance(0, 3)  # the disk is not ready, and the work goes on
    assert saved == []
    clock[0] += outputs.MOST_SECONDS
    threading.Timer(0.2, disk.set).start()
    work.advance(0, 4)  # until the first save has ended
    assert saved[0] == 2
    work._wait()
    assert saved == [2, 4] and recorded(work) == 4
    state = json.loads((work.folder / "progress.json").read_text())
    assert state["lengths"]["kept"] == len(b"two\nthree\n")
    work.close()


def test_a_save_that_fails_is_not_silent(work: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs.os, "fsync", full)
    monkeypatch.setattr(outputs, "SAVE_SECONDS", 0.0)
    with pytest.raises(OSError, match="No space left"):
        for block in range(1000):
            work.advance(0, block)
        work.finish()
    work.close()
    assert not (work.folder / "progress.json").exists()
