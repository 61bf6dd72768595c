"""Every tool installs from its own folder into an environment that holds nothing else, and works.

Torch is not downloaded again: the files of the torch at hand are linked into the new
environment. Everything else comes from the package registry, under the tested constraints.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from house import ROOT, TOOLS, pyproject

pytestmark = [pytest.mark.network, pytest.mark.slow]


def torch_and_its_needs() -> list[importlib.metadata.Distribution]:
    """The installed torch and everything it requires, by the packages' own metadata."""
    found: dict[str, importlib.metadata.Distribution] = {}
    queue = ["torch"]
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # required on other platforms only
        for line in found[name].requires or []:
            if "extra ==" not in line:
                queue.append(re.match(r"[\w.-]+", line).group())
    return list(found.values())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with pip and torch, to be copied."""
    folder = tmp_path_factory.mktemp("install") / "base"
    venv.create(folder, with_pip=True, symlinks=True)
    here = Path(sysconfig.get_paths()["purelib"])
    there = folder / here.relative_to(sys.prefix)
    for distribution in torch_and_its_needs():
        for file in distribution.files or []:
            source = here / file
            # Scripts lie outside site-packages and name the old environment in their first line.
            if ".." in file.parts or not source.exists():
                continue
            target = there / file
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(source, target)
    return folder


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


@pytest.mark.parametrize("tool", TOOLS)
def test_installs_and_imports_alone(tool: str, base: Path) -> None:
    folder = base.parent / tool
    shutil.copytree(base, folder, symlinks=True, copy_function=_link)
    python = folder / "bin" / "python"

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        return done

    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "-q", "-c", constraints, ROOT / "packages" / tool)
    run(python, "-m", "pip", "check")
    others = [name for name in TOOLS if name != tool]
    run(
        python,
        "-c",
        f"import importlib.util as u, {tool}; print({tool}.__version__);"
        f"assert not [n for n in {others} if u.find_spec(n)]",
    )
    for script in pyproject(tool)["project"].get("scripts", {}):
        assert "Usage" in run(folder / "bin" / script, "--help").stdout
    shutil.rmtree(folder)
