"""Names of models in a pipeline: `smollm2` from the testbed, or a folder's or GGUF file's path."""

from __future__ import annotations

from pathlib import Path

from minicpm4.pipeline.stage import needs


def model_path(name: str) -> Path:
    """Where the model called `name` lies.

    Raises:
        FileNotFoundError: no such file or folder, or a folder that is not a model's.
    """
    if name == "smollm2":
        with needs("testbed", "model smollm2"):
            import testbed
        return testbed.smollm2_path()
    path = Path(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"model {name!r} does not exist: expected 'smollm2', a model folder, or a .gguf file"
        )
    if path.is_dir() and not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} is not a model folder: it has no config.json")
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{path} has no weights: expected model.safetensors, or shards with an index, beside "
            "config.json"
        )
    return path


def model_identity(name: str) -> str:
    """Hash that changes when the model does, without reading hundreds of megabytes each run."""
    import hashlib

    path = model_path(name)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                # The head holds a container's own index; sizes and head tell models apart.
                digest.update(stream.read(1 << 20))
    return digest.hexdigest()
