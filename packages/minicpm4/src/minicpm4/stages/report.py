"""Stage `report`: one self-contained page from whatever stages the pipeline has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from minicpm4._files import write_text
from minicpm4.pipeline.manifest import read_manifest, versions
from minicpm4.pipeline.stage import Estimate, Stage, StageConfig, Workspace
from minicpm4.reporting import clean, density, heads, inference, prefill, training, verify
from minicpm4.reporting.blocks import Section
from minicpm4.reporting.page import machine, render


class ReportConfig(StageConfig):
    """Keys of the stage `report` in a pipeline's YAML."""

    title: str = Field(default="MiniCPM4, from raw text to a small fast model")


def run(config: ReportConfig, inputs: dict[str, Path], space: Workspace) -> None:
    """Read every stage's results, draw, write the page."""
    read = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in inputs.items()}
    sections = []
    for name, make in _SECTIONS.items():
        if name not in read:
            continue
        space.progress(f"drawing {name}", len(sections) / len(_SECTIONS))
        section: Section = make(name, read)
        # A stage's manifest lies beside its metrics.
        manifest = read_manifest(inputs[name].parent) or {}
        section.facts["seconds"] = f"{manifest['seconds']:.0f} s" if manifest else ""
        section.facts["command"] = f"{space.command} --only {name}"
        sections.append(section)
    if not sections:
        raise ValueError("there is nothing to report: add a stage before report")
    page = render(
        config.title,
        f"{space.command} · seed {space.seed}",
        sections,
        machine(versions(), space.threads),
    )
    write_text(space.path / "report.html", page)


def _clean(name: str, read: Mapping[str, Any]) -> Section:
    return clean.section(name, read["clean"])


def _verify(name: str, read: Mapping[str, Any]) -> Section:
    return verify.section(name, read["verify"])


def _pretrain(name: str, read: Mapping[str, Any]) -> Section:
    return training.pretrain(name, read["pretrain"], read["pretrain_timings"])


def _ternary(name: str, read: Mapping[str, Any]) -> Section:
    return training.ternary(name, read["ternary"], read.get("pretrain"))


def _sparse(name: str, read: Mapping[str, Any]) -> Section:
    return inference.sparse(name, read["sparse"], read["sparse_timings"], read["sparse_visited"])


def _prefill(name: str, read: Mapping[str, Any]) -> Section:
    return prefill.section(name, read["prefill"], read["prefill_timings"])


def _heads(name: str, read: Mapping[str, Any]) -> Section:
    return heads.section(name, read["heads"])


def _generate(name: str, read: Mapping[str, Any]) -> Section:
    return inference.generate(name, read["generate"], read["generate_timings"])


def _density(name: str, read: Mapping[str, Any]) -> Section:
    return density.section(name, read["density"])


_SECTIONS = {
    "clean": _clean,
    "verify": _verify,
    "pretrain": _pretrain,
    "ternary": _ternary,
    "sparse": _sparse,
    "heads": _heads,
    "prefill": _prefill,
    "generate": _generate,
    "density": _density,
}


STAGE = Stage(
    name="report",
    summary="one self-contained HTML page",
    config=ReportConfig,
    run=run,
    estimate=lambda config, inputs: Estimate(5, 400_000_000, 3_000_000),
    inputs={
        **{name: f"{name}.metrics" for name in _SECTIONS},
        "pretrain_timings": "pretrain.timings",
        "sparse_timings": "sparse.timings",
        "sparse_visited": "sparse.visited",
        "prefill_timings": "prefill.timings",
        "generate_timings": "generate.timings",
    },
    outputs={"report": "report.html"},
    sources=("minicpm4.reporting", "minicpm4.stages.report"),
    takes_what_there_is=True,
)
