"""Checkpoints of a training run: whole or absent, safetensors and JSON, bit for bit."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minicpm4._files import atomic_path, write_json, write_text

# AdamW's state of one parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, each tied one once."""
    return {name: p.detach() for name, p in model.named_parameters()}


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy weights that `save_tensors` or a checkpoint wrote into `model`, in place.

    Raises:
        FileNotFoundError: no such file.
        ValueError: names or shapes that are not the model's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a safetensors file of weights")
    saved, own = load_file(path), weights(model)
    if odd := sorted(saved.keys() ^ own.keys()):
        raise ValueError(
            f"{path} holds another model: {odd[0]} and {len(odd) - 1} more names are in only one "
            "of the two"
        )
    for name, parameter in own.items():
        if parameter.shape != saved[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {list(saved[name].shape)}, the model expects "
                f"{list(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as one safetensors file, atomically."""
    with atomic_path(path) as target:
        save_file({k: v.contiguous() for k, v in tensors.items()}, target)


def save(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    out: Path,
    step: int,
    settings: dict[str, Any],
) -> None:
    """Write the checkpoint of `step`, then drop all before it but the last.

    Args:
        model: its parameters are saved.
        optimizer: AdamW over those parameters.
        out: folder of the run.
        step: steps done.
        settings: JSON-ready; a resumed run must have the same.
    """
    before = _checkpoints(out)
    folder = out / f"checkpoint-{step:08d}"
    if folder in before:
        return
    moments = {
        f"{name}/{key}": optimizer.state[parameter][key].contiguous()
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key in MOMENTS
    }
    with atomic_path(folder) as target:
        target.mkdir()
        save_file(
            {k: v.contiguous() for k, v in weights(model).items()}, target / "model.safetensors"
        )
        save_file(moments, target / "optimizer.safetensors")
        write_json(target / "state.json", {"step": step, "settings": settings})
    for old in before[:-1]:
        shutil.rmtree(old)


def resume(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    out: Path,
    first_step: int,
    settings: dict[str, Any],
) -> int:
    """Load the newest checkpoint if there is one.

    Returns:
        the number of steps done: the checkpoint's, or `first_step`.

    Raises:
        ValueError: the checkpoint's run had other settings, or another model.
    """
    for scratch in out.glob(".*.partial"):
        shutil.rmtree(scratch, ignore_errors=True)
    found = _checkpoints(out)
    if not found:
        return first_step
    state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            raise ValueError(
                f"{out} holds a run with {name}={state['settings'].get(name)!r}, now it is "
                f"{value!r}: use another folder, or remove that one to start over"
            )
    load_weights(model, found[-1] / "model.safetensors")
    moments = load_file(found[-1] / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        if f"{name}/step" in moments:
            # Cloned, because a loaded tensor is a view of the file, which a later save drops.
            optimizer.state[parameter] = {key: moments[f"{name}/{key}"].clone() for key in MOMENTS}
    return state["step"]


def cut_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop what the log says beyond `step`; returns the rows that stay."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the line a kill cut short
            row = json.loads(line)
            if row["step"] <= step:
                rows.append(row)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoint-*"))
