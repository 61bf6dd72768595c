"""What a user mistypes: one line, exit code 2, and before the slow part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infllm2 import _cli
from infllm2.cli import app


def fails(*arguments: str) -> str:
    """The message of an error that `_cli.run` makes one line of."""
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, _cli.USER_ERRORS), result.output
    return " ".join(str(result.exception).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "tokens must be at least 1, got 0"),
        (["--heads", "3", "--kv-heads", "2"], "heads must be a multiple of kv_heads"),
        (["--kv-heads", "0"], "kv_heads must be at least 1"),
        (["--head-dim", "-1"], "head_dim must be at least 1"),
        (["--lse", "foo"], 'lse must be "approx" or "exact", got \'foo\''),
        (["--topk", "0"], "topk must be an integer of at least 1, got 0"),
        (["--init-blocks", "65"], "init_blocks must not exceed topk"),
        (["--kernel-size", "24"], "kernel_size must be a multiple of kernel_stride"),
    ],
)
def test_explain(arguments: list[str], message: str) -> None:
    assert message in fails("explain", *arguments)


@pytest.mark.parametrize(
    "arguments", [["nosuch"], ["explain", "--tokens", "x"], ["selfcheck", "x"]]
)
def test_usage(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., str]:
    """`visualize` with files that are almost right; loading the weights would fail the test."""
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    (model / "tokenizer.json").write_text("{}")
    (tmp_path / "prompt.txt").write_text("one two three")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")

    def run(*options: str, model: str = "model", prompt: str = "prompt.txt", to: str = "x.png"):
        paths = [str(tmp_path / name) for name in (model, prompt, to)]
        return fails("visualize", paths[0], "--prompt-file", paths[1], "-o", paths[2], *options)

    run.path = tmp_path
    return run


def test_visualize(folder: Callable[..., str]) -> None:
    assert "no folder of a transformers model" in folder(model="nosuch")
    assert "no folder of a transformers model" in folder(model="prompt.txt")
    assert "does not exist, or is no file" in folder(prompt="nosuch.txt")
    assert "does not exist, or is no file" in folder(prompt="model")
    assert "binary.txt is not UTF-8 text" in folder(prompt="binary.txt")
    assert "name a file in a folder that exists" in folder(to="nosuch/x.png")
    assert "name a file in a folder that exists" in folder(to="model")
    assert "max_tokens must be at least 2, got -3" in folder("--max-tokens", "-3")
    assert "layer must lie in -2 … 1, got 2" in folder("--layer", "2")
    assert "window_size must be a multiple" in folder("--window-size", "100")
    (folder.path / "model" / "config.json").write_text("{ not JSON")
    assert "config.json cannot be read" in folder()
    (folder.path / "model" / "tokenizer.json").unlink()
    assert "holds no tokenizer" in folder()
