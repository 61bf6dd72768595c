"""Sections to one HTML file that needs nothing beside it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from minicpm4.reporting.blocks import Section, number


def render(
    title: str, subtitle: str, sections: Sequence[Section], environment: Mapping[str, str]
) -> str:
    """The page as HTML text; all text is escaped, only figures are taken as they are."""
    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    engine.filters["show"] = number
    source = resources.files("minicpm4.reporting").joinpath("template.html").read_text("utf-8")
    return engine.from_string(source).render(
        title=title, subtitle=subtitle, sections=sections, environment=environment
    )


def machine(versions: Mapping[str, str], threads: int) -> dict[str, str]:
    """What the numbers of a report depend on: processor, cores, memory, system, versions."""
    import psutil

    facts = {
        "processor": _processor(),
        "threads used": f"{threads} of {os.cpu_count()}",
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    return {**facts, **versions}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
