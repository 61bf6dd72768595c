"""What every benchmark here shares: interleaved timing behind a correctness gate, one JSON format.

A benchmark is a list of `Case`s handed to `main`. For each, ours and the peer's results are
compared first; a wrong result is never timed. Then both run in turn, warm, and pairs are compared.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A benchmark is named after the tool that it measures: once this file is found, its folder must not
# be searched any more, or `import infllm2` would find the benchmark instead of the tool.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]

RESULTS = Path(__file__).parent / "results"
REPEATS = 7


@dataclass(frozen=True)
class Case:
    """One row: two ways to do the same work.

    Attributes:
        name: what is measured, with its sizes.
        unit: of the result, "higher is better": work / seconds, such as "tokens/s".
        work: how much of it one call does.
        ours, peer: callables that return what `check` compares.
        peer_name: the fastest way a user has today.
        check: raises AssertionError when the two results are not the same.
        bound: physical or theoretical limit in the same unit, where one is known.
        bar: smallest ratio that counts as passed, where one was set.
        repeats: pairs that are timed.
    """

    name: str
    unit: str
    work: float
    ours: Callable[[], Any]
    peer: Callable[[], Any]
    peer_name: str
    check: Callable[[Any, Any], None]
    bound: float | None = None
    bar: float | None = None
    repeats: int = REPEATS


def environment() -> dict[str, Any]:
    """Processor, GPU, threads, versions, commit: what a number depends on."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [li for li in info.read_text().splitlines() if li.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "numpy", "fasttext-community"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent
    ).stdout.strip()
    gpu = {}
    if torch.cuda.is_available():
        gpu = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return gpu | {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit or "unknown",
    }


def wall_seconds(call: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    case: Case, seconds_of: Callable[[Callable[[], Any]], float] = wall_seconds
) -> dict[str, Any]:
    """Gate, warm up, time in turn; a row in the format of docs/architecture.md.

    `ratio` is the median of the pairs' ratios, which drifts less than the ratio of the medians.
    """
    case.check(case.ours(), case.peer())
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(case.repeats):
        for side, call in (("ours", case.ours), ("peer", case.peer)):
            seconds[side].append(seconds_of(call))
    ratios = [p / o for o, p in zip(seconds["ours"], seconds["peer"], strict=True)]
    ratio = statistics.median(ratios)
    row = {
        "name": case.name,
        "unit": case.unit,
        "ours": case.work / statistics.median(seconds["ours"]),
        "peer": case.work / statistics.median(seconds["peer"]),
        "peer_name": case.peer_name,
        "ratio": ratio,
        "spread": [min(ratios), max(ratios)],
        "bound": case.bound,
        "bar": case.bar,
        "pass": None if case.bar is None else ratio >= case.bar,
    }
    return row


def main(
    tool: str,
    cases: Iterable[Case | dict[str, Any]],
    update: bool = False,
    measure: Callable[[Case], dict[str, Any]] = measure,
) -> None:
    """Measure all cases, print a table, write results/<tool>.json, print that JSON last.

    Args:
        tool: name of the results' file.
        cases: may be a generator, so that what one case holds in memory is free for the next. A
            dict is a row that was measured already.
        update: keep the file's rows of other names or from other processors, with the environment
            they were measured in.
        measure: turns a case into a row.
    """
    result: dict[str, Any] = {"tool": tool, "env": environment(), "rows": []}
    RESULTS.mkdir(exist_ok=True)
    print(f"{'case':<64} {'ours':>12} {'peer':>12} {'ratio':>7}  unit, peer")
    file = RESULTS / f"{tool}.json"
    old = json.loads(file.read_text(encoding="utf-8")) if update and file.exists() else None
    for case in cases:
        row = case if isinstance(case, dict) else measure(case)
        result["rows"].append(row)
        missed = "" if row["pass"] in (None, True) else f", BAR {row['bar']:.2f} MISSED"
        print(
            f"{row['name']:<64} {row['ours']:>12,.1f} {row['peer']:>12,.1f} {row['ratio']:>6.2f}×  "
            f"{row['unit']}, {row['peer_name']}{missed}",
            flush=True,
        )
        # After every row: an interrupted run loses one row, not all.
        file.write_text(json.dumps(_merged(result, old), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(_merged(result, old)))
    sys.stdout.flush()


def _merged(result: dict[str, Any], old: dict[str, Any] | None) -> dict[str, Any]:
    """The result, and the old rows that it does not replace, each with the environment it has."""
    if old is None:
        return result
    rows = [{"env": old["env"], **row} for row in old["rows"]]
    names, cpu = {row["name"] for row in result["rows"]}, result["env"]["cpu"]
    kept = [row for row in rows if row["name"] not in names or row["env"]["cpu"] != cpu]
    return {**result, "rows": result["rows"] + kept}
