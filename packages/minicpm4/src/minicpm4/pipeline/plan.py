"""`minicpm4 plan`: what a run would do and need, before anything runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from minicpm4.pipeline.config import Pipeline, Step, is_path
from minicpm4.pipeline.runner import Runner


def print_plan(pipeline: Pipeline, out: Path) -> None:
    """Print the table of stages, and what is short on this machine."""
    runner = Runner(pipeline, out)
    table = Table(title=f"{pipeline.name}: {len(pipeline.steps)} stages into {out}")
    for column in ("stage", "now", "reads", "time", "memory", "disk"):
        table.add_column(
            column, justify="right" if column in ("time", "memory", "disk") else "left"
        )
    seconds, disk, memory = 0.0, 0, 0
    for step, state in runner.states():
        step.stage.check(step.config)
        inputs = {
            name: Path(origin).expanduser()
            if is_path(origin)
            else out / origin.split(".")[0] / _artefact(pipeline, origin)
            for name, origin in step.origins.items()
        }
        need = step.stage.estimate(step.config, inputs)
        todo = state.action != "skip"
        if todo:
            seconds += need.seconds
            disk += need.disk_bytes
            memory = max(memory, need.memory_bytes)
        table.add_row(
            step.name,
            f"{state.action} ({state.reason})",
            _reads(step) or need.detail or "-",
            _duration(need.seconds) if todo else "-",
            f"{need.memory_bytes / 1e9:.1f} GB" if todo else "-",
            f"{need.disk_bytes / 1e6:.0f} MB" if todo else "-",
        )
    console = Console(width=max(100, shutil.get_terminal_size().columns))
    console.print(table)
    existing = next(p for p in [out, *out.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    available = psutil.virtual_memory().available
    console.print(
        f"To do: about {_duration(seconds)} on {pipeline.threads} of {os.cpu_count()} cores, "
        f"at most {memory / 1e9:.1f} GB of memory ({available / 1e9:.1f} GB available), "
        f"{disk / 1e6:.0f} MB of disk ({free / 1e9:.1f} GB free)."
    )
    if free < disk or available < memory:
        console.print("[red]This machine has less than that: the run would stop with an error.")


def _reads(step: Step) -> str:
    """The stages and files a step takes its inputs from, each once."""
    names = (o if is_path(o) else o.partition(".")[0] for o in step.origins.values())
    return ", ".join(dict.fromkeys(names))


def _artefact(pipeline: Pipeline, origin: str) -> str:
    maker, _, artefact = origin.partition(".")
    return pipeline.step(maker).stage.outputs[artefact]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
