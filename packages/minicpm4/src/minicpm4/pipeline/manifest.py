"""When is a stage done? Fingerprints of what decides a result, and the manifest that records it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

from minicpm4._files import sha256, write_json
from minicpm4.pipeline.config import Step, is_path

MANIFEST = "manifest.json"
# Versions that can change a number; anything else a stage uses is named in its `sources`.
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "fasttext-community")


def source_hash(module: str) -> str:
    """Hash of the Python source of a module or of a whole package, found without importing it.

    A tool that is not installed hashes as "missing": its stage then fails with the tool's own
    message when it runs, and runs again once the tool is there.
    """
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return "missing"
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(origin.parent).as_posix().encode() + b"\0")
        digest.update(file.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(step: Step, seed: int, input_hashes: dict[str, str]) -> dict[str, Any]:
    """Everything that decides what a step computes, as JSON.

    Speed-only settings are left out: the thread count, and where the run folder lies.
    """
    return {
        "stage": step.stage.name,
        "config": step.config.model_dump(mode="json", exclude={"inputs"}),
        "seed": seed,
        "inputs": input_hashes,
        "external": dict(step.stage.external(step.config)),
        "sources": {name: source_hash(name) for name in step.stage.sources},
        "versions": versions(),
    }


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What changed between two fingerprints, in a few words; empty if nothing did."""
    changed = []
    for key in new:
        before, after = old.get(key), new[key]
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
            changed.append(f"{key}: {', '.join(sorted(names))}")
        else:
            changed.append(key)
    return "; ".join(changed)


def output_hashes(step: Step, folder: Path) -> dict[str, str]:
    """Hash of each output of a step in `folder`; ValueError if the stage did not make one."""
    hashes = {}
    for name, relative in step.stage.outputs.items():
        path = folder / relative
        if not path.exists():
            raise ValueError(f"stage {step.name!r} ended without making {relative}")
        hashes[name] = sha256(path)
    return hashes


def write_manifest(
    step: Step, folder: Path, marks: dict[str, Any], outputs: dict[str, str], seconds: float
) -> None:
    """Record in `folder` what its step computed, from what, and how long it took."""
    write_json(
        folder / MANIFEST,
        {"step": step.name, "fingerprint": marks, "outputs": outputs, "seconds": seconds},
    )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished step, or None where there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return manifest if isinstance(manifest, dict) and "fingerprint" in manifest else None


def hash_input(step: Step, name: str, origin: str, made: dict[str, str]) -> str:
    """Hash of one input: of an earlier step's artefact as recorded, or of a path's content.

    Raises:
        FileNotFoundError: the path does not exist.
    """
    if not is_path(origin):
        return made[origin]
    path = Path(origin).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"stages.{step.name}.inputs.{name}: {origin} does not exist; "
            "give the path of a file or folder, relative to where you run the command"
        )
    return sha256(path)
