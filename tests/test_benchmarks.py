"""Benchmarks of what is not here run on small sizes, so that they still run where it is."""

from __future__ import annotations

import subprocess
import sys

from house import ROOT


def test_the_gpu_rows_of_apb_run_small() -> None:
    """Its correctness gates hold: the core against a written-out mask, a prefill against dense."""
    command = [sys.executable, ROOT / "benchmarks" / "apb_gpu.py", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("attention core, last of 4 hosts") and lines[1].startswith("all")
