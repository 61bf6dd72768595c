"""What a stage is: a plain function from a configuration and artefacts to more artefacts."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from minicpm4._files import write_json


class StageConfig(BaseModel):
    """Base of every stage's configuration: unknown keys are errors, values are final."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: dict[str, str] = {}
    """Replaces where an input comes from: `stage.artefact`, or the path of a file or folder."""


@dataclass(frozen=True)
class Estimate:
    """What a stage is expected to need, said before anything runs."""

    seconds: float
    memory_bytes: int
    disk_bytes: int
    detail: str = ""


@dataclass
class Workspace:
    """What the runner gives a running stage.

    `path` is private to the stage and survives a kill: whatever the stage checkpoints there, it
    finds again when it is run with the same fingerprint.
    """

    path: Path
    seed: int
    threads: int
    command: str = "minicpm4 run"
    """What the user typed to run the whole pipeline."""
    _report: Callable[[str, float | None], None] = field(default=lambda text, done: None)

    def progress(self, text: str, done: float | None = None) -> None:
        """Show what the stage is doing; `done` in 0..1 draws a bar."""
        self._report(text, done)

    def write_metrics(self, values: Mapping[str, Any]) -> None:
        """Write `metrics.json`: what was computed, equal however often the stage was killed."""
        write_json(self.path / "metrics.json", dict(values))

    def write_timings(self, values: Mapping[str, Any]) -> None:
        """Write `timings.json`: what was measured with a clock or a memory counter."""
        write_json(self.path / "timings.json", dict(values))

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the JSON value of `compute()`, computed at most once even across kills."""
        path = self.path / "steps" / f"{name}.json"
        if not path.exists():
            write_json(path, compute())
        # Read back even when just computed, so that a fresh run and a resumed one see equal values.
        return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Stage:
    """A registered stage type."""

    name: str
    summary: str
    config: type[StageConfig]
    run: Callable[[Any, dict[str, Path], Workspace], None]
    estimate: Callable[[Any, dict[str, Path]], Estimate]
    inputs: Mapping[str, str]
    """Input name -> where it comes from by default, as `stage.artefact`."""
    outputs: Mapping[str, str]
    """Artefact name -> file or folder inside the stage's folder."""
    sources: tuple[str, ...]
    """Modules and packages whose source decides the result: when it changes, it runs again."""
    takes_what_there_is: bool = False
    """Inputs whose stage is not in the pipeline are left out, instead of being an error."""
    external: Callable[[Any], Mapping[str, str]] = lambda config: {}
    """Identity (name -> hash or version) of what the stage reads from outside the pipeline."""
    check: Callable[[Any], None] = lambda config: None
    """Raises ValueError or FileNotFoundError for what cannot work, before any work is done."""


# The module of a stage is imported when a pipeline names it, so that `minicpm4 --help` stays fast.
STAGES = {
    name: f"minicpm4.stages.{name}"
    for name in (
        "clean",
        "verify",
        "pretrain",
        "ternary",
        "sparse",
        "heads",
        "prefill",
        "generate",
        "density",
        "report",
    )
}


def find_stage(name: str) -> Stage:
    """The stage type called `name`; ValueError lists the known ones."""
    if name not in STAGES:
        raise ValueError(f"unknown stage {name!r}: expected one of {', '.join(STAGES)}")
    return importlib.import_module(STAGES[name]).STAGE


@contextmanager
def needs(tool: str, stage: str) -> Iterator[None]:
    """Turn a missing tool into one line that names the stage and the command that installs it."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] != tool:
            raise
        raise ImportError(
            f"stage {stage!r} needs the tool {tool!r}: pip install ./packages/{tool} "
            f"(or everything: pip install './packages/minicpm4[pipeline]' with its siblings)",
            name=tool,
        ) from error
