"""The `minicpm4` command: run a pipeline, plan it, talk to a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from minicpm4 import _cli

app = typer.Typer(
    help="MiniCPM4: from raw text to a small model that answers fast, stage by stage.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

PipelineArgument = Annotated[
    str, typer.Argument(help="A recipe's name (see `minicpm4 recipes`) or the path of a YAML file.")
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Run folder. [default: runs/<name of the pipeline>]"),
]


def _runs_in(out: Path | None, name: str) -> Path:
    return out if out is not None else Path("runs") / name


@app.command()
def run(
    pipeline: PipelineArgument = "quickstart",
    out: OutOption = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Run this stage and all later ones again."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="STAGE", help="Run this stage alone, again; what it needs is done."),
    ] = None,
) -> None:
    """Run a pipeline: stages that are done are skipped, a killed one goes on where it was."""
    from minicpm4.pipeline.config import load_pipeline
    from minicpm4.pipeline.display import Display
    from minicpm4.pipeline.runner import Runner

    if start and only:
        raise ValueError("--from and --only exclude each other: give one of them")
    loaded = load_pipeline(pipeline)
    folder = _runs_in(out, loaded.name)
    with Display() as display:
        Runner(loaded, folder, display).run(start=start, only=only)
    for step in loaded.steps:
        for artefact in step.stage.outputs.values():
            if artefact.endswith(".html") and (folder / step.name / artefact).exists():
                print(f"report: {folder / step.name / artefact}")


@app.command()
def plan(pipeline: PipelineArgument = "quickstart", out: OutOption = None) -> None:
    """Print what `run` would do: stages, inputs, expected time, memory and disk. Runs nothing."""
    from minicpm4.pipeline.config import load_pipeline
    from minicpm4.pipeline.plan import print_plan

    loaded = load_pipeline(pipeline)
    print_plan(loaded, _runs_in(out, loaded.name))


@app.command()
def recipes() -> None:
    """List the pipelines that ship with the package."""
    from minicpm4.pipeline.config import load_pipeline
    from minicpm4.pipeline.config import recipes as names

    for name in names():
        steps = ", ".join(step.name for step in load_pipeline(name).steps)
        print(f"{name}: {steps}")


@app.command()
def chat(
    model: Annotated[
        str,
        typer.Option(
            help="`smollm2` (from the testbed), a model folder, or a .gguf file.",
        ),
    ] = "smollm2",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = always the likeliest.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Makes sampled answers repeatable.")] = None,
) -> None:
    """Talk to a model in the terminal, through cpmcu. /reset forgets, /exit or Ctrl-D ends."""
    from minicpm4.pipeline.models import model_path
    from minicpm4.pipeline.stage import needs

    with needs("cpmcu", "chat"):
        import cpmcu.chat
        from cpmcu import Engine

    engine = Engine.from_pretrained(model_path(model))
    cpmcu.chat.run(
        engine,
        system=system,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        stdin=sys.stdin,
        stdout=sys.stdout,
    )


def main() -> None:
    """Console script."""
    _cli.run(app)
