from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import locret


def test_version_is_the_distribution_s() -> None:
    assert locret.__version__ == importlib.metadata.version("minicpm4-locret")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = locret.nothing


def test_import_is_light() -> None:
    heavy = ["transformers", "typer", "rich", "matplotlib", "safetensors"]
    code = (
        "import sys, locret\n"
        "from locret import LocretConfig, chunked_prefill\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
