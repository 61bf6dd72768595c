"""Each shell command and Python example of each README runs as written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from house import ROOT

READMES = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md"))]
BLOCK = re.compile(
    r"(?P<skip><!-- not run: [^>]+-->\s*\n)?^```(?P<language>python|bash|sh|console)\n"
    r"(?P<code>.*?)^```",
    re.M | re.S,
)


class Example(NamedTuple):
    """One fenced block of one README."""

    readme: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.readme.parent.name}:{self.line}"


def examples() -> list[Example]:
    """The blocks to run, in order of file and line."""
    found = []
    for readme in READMES:
        text = readme.read_text("utf-8")
        for match in BLOCK.finditer(text):
            if match["skip"]:
                continue
            line = text[: match.start("code")].count("\n") + 1
            found.append(Example(readme, line, match["language"], match["code"]))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """One working folder for each README: a later block may use what an earlier one made."""
    return {readme: tmp_path_factory.mktemp("readme") for readme in READMES}


@pytest.mark.parametrize("example", examples(), ids=str)
def test_example_runs(example: Example, folders: dict[Path, Path]) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
    }
    if example.language == "python":
        command = [sys.executable, "-c", example.code]
    else:
        # `pip install` lines are what tests/test_install_alone.py runs in clean environments.
        lines = [li for li in example.code.splitlines() if not li.startswith("pip install")]
        if not any(line.strip() and not line.startswith("#") for line in lines):
            pytest.skip("only installs, which test_install_alone.py runs")
        command = ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]
    done = subprocess.run(
        command,
        cwd=folders[example.readme],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{example}\n{example.code}\n{done.stdout}\n{done.stderr}"


def test_every_readme_has_an_example() -> None:
    with_example = {example.readme for example in examples()}
    assert with_example == set(READMES)


def test_links_into_the_repository_lead_somewhere() -> None:
    for readme in [*READMES, *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", readme.read_text("utf-8")):
            assert (readme.parent / target).exists(), f"{readme.relative_to(ROOT)} links {target}"
