"""Who may know whom, what an import may do, and that every package carries what it must."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap

import pytest
from house import ROOT, TOOLS, imports, pyproject, sources

# docs/architecture.md, "Who may know whom". A guarded import costs a feature, never an ImportError.
GUARDED = {"cpmcu": {"infllm2", "bitcpm"}, "apb": {"locret"}}
HEAVY = ("transformers", "typer", "rich", "matplotlib", "scipy", "fasttext", "pandas", "datatrove")


def is_guarded(around: list[ast.AST]) -> bool:
    """Whether an import happens only when a function is called, or under `try`."""
    lazy = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Try)
    return any(isinstance(node, lazy) for node in around)


def test_every_tool_of_the_design_is_here() -> None:
    assert set(TOOLS) >= {
        *("testbed", "minicpm4", "infllm2", "ultraclean"),
        *("bitcpm", "cpmcu", "apb", "locret", "densing"),
    }


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_imports_only_whom_it_may(tool: str) -> None:
    for path in sources(tool):
        for module, node, around in imports(path):
            other = module.split(".")[0]
            if other not in TOOLS or other == tool:
                continue
            where = f"{path.relative_to(ROOT)}:{node.lineno} imports {other}"
            if tool == "minicpm4":
                in_types = any(isinstance(n, ast.If) for n in around)
                assert is_guarded(around) or in_types, f"{where} when it is itself imported"
                continue
            assert other in GUARDED.get(tool, ()), f"{where}: the design forbids it"
            assert is_guarded(around), f"{where} without a guard"


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_requires_no_other_tool(tool: str) -> None:
    required = " ".join(pyproject(tool)["project"]["dependencies"])
    for other in TOOLS:
        assert f"minicpm4-{other}" not in required


def test_an_import_is_light_and_changes_nothing() -> None:
    """One process per tool, torch first: what the tool's own import adds."""
    program = textwrap.dedent("""
        import json, logging, os, random, signal, sys, time, warnings
        import numpy, torch
        def state():
            return [
                torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(),
                torch.get_rng_state().sum().item(), random.getstate()[1][:4],
                str(numpy.random.get_state()[1][:4]), dict(os.environ), signal.getsignal(2),
                len(warnings.filters), logging.root.level, len(logging.root.handlers),
                torch.is_grad_enabled(), torch.backends.mkldnn.enabled, sys.excepthook,
            ]
        tool = sys.argv[1]
        before, heavy = repr(state()), set(sys.argv[2:]) & set(sys.modules)
        began = time.perf_counter()
        module = __import__(tool)
        seconds = time.perf_counter() - began
        print(json.dumps({
            "seconds": seconds,
            "changed": before != repr(state()),
            "heavy": sorted((set(sys.argv[2:]) & set(sys.modules)) - heavy),
            "cuda": torch.cuda.is_initialized(),
            "version": module.__version__,
            "missing": [name for name in module.__all__ if not hasattr(module, name)],
        }))
    """)
    for tool in TOOLS:
        attempts = []
        for _ in range(3):
            command = [sys.executable, "-c", program, tool, *HEAVY]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"import {tool}:\n{done.stderr}"
            attempts.append(json.loads(done.stdout))
            if attempts[-1]["seconds"] < 1.0:
                break
        result = attempts[-1]
        assert min(a["seconds"] for a in attempts) < 1.0, f"import {tool}: {attempts}"
        assert not result["changed"], f"import {tool} changes global state"
        assert not result["heavy"], f"import {tool} imports {result['heavy']}"
        assert not result["cuda"], f"import {tool} initialises CUDA"
        assert not result["missing"], f"{tool}.__all__ names what is not there"
        assert result["version"] == pyproject(tool)["project"]["version"]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_package_carries_what_it_must(tool: str) -> None:
    folder = ROOT / "packages" / tool
    project = pyproject(tool)["project"]
    assert project["name"] == ("minicpm4" if tool == "minicpm4" else f"minicpm4-{tool}")
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (folder / "LICENSE").read_text("utf-8")
    readme = (folder / "README.md").read_text("utf-8")
    assert f"pip install ./packages/{tool}" in readme, "the README does not say how to install"
    assert "## Status" in readme, "the README does not say what works and what does not"
    assert list((folder / "tests").glob("test_*.py")), "no tests"


def test_one_version_for_all() -> None:
    assert len({pyproject(tool)["project"]["version"] for tool in TOOLS}) == 1


def test_files_stay_readable() -> None:
    """The house's measure: one idea, one file, under 300 lines."""
    long = {
        str(path.relative_to(ROOT)): lines
        for tool in TOOLS
        for path in sources(tool)
        if (lines := path.read_text("utf-8").count("\n")) > 300
    }
    assert not long
