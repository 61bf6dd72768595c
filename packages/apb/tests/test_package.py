from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import apb


def test_names_and_version() -> None:
    assert all(getattr(apb, name) is not None for name in apb.__all__)
    assert set(apb.__all__) <= set(dir(apb))
    assert apb.__version__ == importlib.metadata.version("minicpm4-apb")
    with pytest.raises(AttributeError, match="no attribute 'ring'"):
        apb.ring  # noqa: B018


def test_import_is_lean() -> None:
    code = (
        "import sys, apb\nassert 'torch' not in sys.modules\n"
        "for name in apb.__all__: getattr(apb, name)\n"
        "bad = {'transformers', 'typer', 'rich', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
