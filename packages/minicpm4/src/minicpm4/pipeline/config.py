"""Reading a pipeline from YAML: every mistake named by file and key, before anything runs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minicpm4.pipeline.stage import STAGES, Stage, StageConfig, find_stage


class _Head(BaseModel):
    """The keys of the file itself; a stage's own keys are checked by the stage's configuration."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = 0
    threads: int = Field(default=0, ge=0, description="0 = all cores this process may use")
    stages: dict[str, dict | None] = Field(min_length=1)


@dataclass(frozen=True)
class Step:
    """One stage of one pipeline: its name there, its type, its checked configuration."""

    name: str
    stage: Stage
    config: StageConfig
    origins: dict[str, str]
    """Input name -> `stage.artefact` of an earlier step, or a path."""


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline."""

    name: str
    seed: int
    threads: int
    steps: tuple[Step, ...]
    source: str
    """What the user typed to name it: a recipe's name or a path."""

    def step(self, name: str) -> Step:
        """The step called `name`; ValueError lists the pipeline's steps."""
        for step in self.steps:
            if step.name == name:
                return step
        known = ", ".join(step.name for step in self.steps)
        raise ValueError(f"unknown stage {name!r} in {self.source}: it has {known}")


def recipes() -> list[str]:
    """Names of the pipelines that ship with the package."""
    folder = resources.files("minicpm4.recipes")
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_pipeline(source: str) -> Pipeline:
    """Read and check a pipeline.

    Args:
        source: the name of a shipped recipe (see `recipes()`) or the path of a YAML file.

    Raises:
        FileNotFoundError: neither a recipe nor a file.
        ValueError: not YAML, an unknown key or stage, a value out of range, an input that no
            earlier stage makes; the message names the file, the key and the fix.
    """
    text = _read(source)
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{source}: expected keys 'name' and 'stages' at the top, got {raw!r:.60}")
    try:
        head = _Head.model_validate(raw)
    except ValidationError as error:
        raise ValueError(_explain(source, (), error, _Head)) from None

    steps: list[Step] = []
    for name, settings in head.stages.items():
        settings = dict(settings or {})
        # `uses` lets a pipeline hold the same kind of stage twice under two names.
        kind = settings.pop("uses", name)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"{source}: stage name {name!r}: use letters, digits, - and _")
        if kind not in STAGES:
            hint = _closest(str(kind), list(STAGES))
            raise ValueError(
                f"{source}: unknown stage {kind!r}{hint}; stages are {', '.join(STAGES)}"
            )
        stage = find_stage(kind)
        try:
            config = stage.config.model_validate(settings)
        except ValidationError as error:
            raise ValueError(_explain(source, ("stages", name), error, stage.config)) from None
        steps.append(Step(name, stage, config, _origins(source, name, stage, config, steps)))
    threads = head.threads or len(os.sched_getaffinity(0))
    return Pipeline(head.name, head.seed, threads, tuple(steps), source)


def _read(source: str) -> str:
    if source in recipes():
        return resources.files("minicpm4.recipes").joinpath(f"{source}.yaml").read_text("utf-8")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"no pipeline {source!r}: expected a YAML file, or one of the recipes "
            f"{', '.join(recipes())}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not a text file ({error.reason} at {error.start})") from None


def _origins(
    source: str, name: str, stage: Stage, config: StageConfig, earlier: list[Step]
) -> dict[str, str]:
    """Where each input of a step comes from: the pipeline's choice before the stage's default."""
    where = f"{source}: stages.{name}.inputs"
    for key in config.inputs:
        if key not in stage.inputs:
            known = ", ".join(stage.inputs) or "none"
            raise ValueError(f"{where}.{key}: unknown input; {stage.name} takes {known}")
    origins = {}
    for key, origin in {**stage.inputs, **config.inputs}.items():
        if not is_path(origin):
            maker_name, _, artefact = origin.partition(".")
            maker = next((step for step in earlier if step.name == maker_name), None)
            if maker is None and stage.takes_what_there_is and key not in config.inputs:
                continue
            if maker is None:
                raise ValueError(
                    f"{where}.{key}: no earlier stage {maker_name!r} makes {origin!r}; add it "
                    f"before {name!r}, or give the path of a file or folder (with a /)"
                )
            if artefact not in maker.stage.outputs:
                raise ValueError(
                    f"{where}.{key}: stage {maker_name!r} has no artefact {artefact!r}; it makes "
                    f"{', '.join(maker.stage.outputs)}"
                )
        origins[key] = origin
    return origins


def is_path(origin: str) -> bool:
    """Whether an input's origin is a path: it has a slash, where `stage.artefact` never has one."""
    return "/" in origin


def _closest(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _explain(
    source: str, prefix: tuple[str, ...], error: ValidationError, model: type[BaseModel]
) -> str:
    """One line for the first of pydantic's complaints, with the key's full path."""
    first = error.errors()[0]
    key = ".".join([*prefix, *(str(part) for part in first["loc"])])
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = sorted(model.model_fields)
        hint = _closest(str(first["loc"][-1]), known)
        return f"{source}: unknown key {key!r}{hint}; keys here are {', '.join(known)}{more}"
    if first["type"] == "missing":
        return f"{source}: key {key!r} is missing{more}"
    return f"{source}: {key}: {first['msg']}, got {first['input']!r:.60}{more}"
