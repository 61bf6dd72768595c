from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.cache import cache_dir, turn


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("TESTBED_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "minicpm4" / "testbed"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == Path.home() / ".cache" / "minicpm4" / "testbed"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "minicpm4" / "testbed"
    assert not (tmp_path / "own").exists()


def test_one_process_at_a_time_and_a_dead_one_blocks_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path))
    program = (
        "import sys, time\nfrom testbed.cache import turn\n"
        "with turn('x'):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with turn("another name"):
            pass
        # It ends 2 s from now, while the next line waits for it.
        reaper = subprocess.Popen(
            [sys.executable, "-c", f"import os, time; time.sleep(2); os.kill({holder.pid}, 9)"]
        )
        with caplog.at_level(logging.WARNING), turn("x"):
            assert reaper.poll() is not None or holder.poll() is not None
        assert "waiting for another process that is preparing x" in caplog.text
        reaper.wait()
    finally:
        holder.kill()
        holder.wait()
