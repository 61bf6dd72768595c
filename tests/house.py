"""Facts about the repository that several tests here read from its files."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOOLS = sorted(p.parent.name for p in (ROOT / "packages").glob("*/pyproject.toml"))


def pyproject(tool: str) -> dict:
    """A package's pyproject.toml."""
    return tomllib.loads((ROOT / "packages" / tool / "pyproject.toml").read_text("utf-8"))


def sources(tool: str) -> list[Path]:
    """The Python files a package installs."""
    return sorted((ROOT / "packages" / tool / "src").rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, ast.AST, list[ast.AST]]]:
    """Every absolute import in a file: the module, its node, and the nodes around it."""

    def walk(node: ast.AST, around: list[ast.AST]) -> Iterator[tuple[str, ast.AST, list[ast.AST]]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child, around
            elif isinstance(child, ast.ImportFrom) and child.level == 0 and child.module:
                yield child.module, child, around
            yield from walk(child, [*around, child])

    yield from walk(ast.parse(path.read_text("utf-8"), str(path)), [])
