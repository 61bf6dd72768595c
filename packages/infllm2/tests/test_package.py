from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import infllm2


def test_version_is_the_distribution_s() -> None:
    assert infllm2.__version__ == importlib.metadata.version("minicpm4-infllm2")


def test_every_public_name_loads() -> None:
    for name in infllm2.__all__:
        assert callable(getattr(infllm2, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = infllm2.nothing


def test_import_is_light() -> None:
    heavy = ["transformers", "typer", "rich", "matplotlib", "scipy", "pandas"]
    code = (
        "import sys, infllm2\n"
        "from infllm2 import InfLLMv2Config, select_blocks, infllmv2_attention\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_explain_needs_no_torch() -> None:
    """Arithmetic should not wait for a tensor library to load."""
    code = (
        "import sys; sys.argv = ['infllm2', 'explain']\n"
        "from infllm2.cli import app\n"
        "app(standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "False"
