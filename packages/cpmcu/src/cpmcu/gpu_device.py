"""The GPU that the engine would run on, and why not. Nothing here touches CUDA when imported."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys

from cpmcu import _torch
from cpmcu._torch import torch

LEAST = (8, 0)  # compute capability: bfloat16 matrix units


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU: for tests only."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


# Without one of these there is no driver that PyTorch could use: no need to import it to know.
_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/nvmap", "/dev/kfd")


def present() -> bool:
    """Whether PyTorch is there and sees a CUDA device."""
    possible = sys.platform != "linux" or any(os.path.exists(path) for path in _DEVICES)
    return possible and _torch.is_installed() and torch.cuda.is_available()


def find() -> tuple[torch.device | None, str]:
    """The device, or None and the reason. In Triton's interpreter without a GPU it is the CPU."""
    if not _torch.is_installed():
        return None, _torch.MISSING
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed (pip install 'minicpm4-cpmcu[triton]')"
    if present():
        capability = torch.cuda.get_device_capability()
        if capability < LEAST:
            name = torch.cuda.get_device_name()
            return None, f"it needs compute capability {LEAST}, and {name} has {capability}"
        return torch.device("cuda", torch.cuda.current_device()), ""
    if interpreted():
        return torch.device("cpu"), ""
    return None, (
        f"PyTorch {torch.__version__} finds no CUDA device; on a CPU it runs only in Triton's "
        "interpreter, for tests (TRITON_INTERPRET=1)"
    )


def required() -> torch.device:
    """The device.

    Raises:
        ValueError: there is none, and why.
    """
    device, reason = find()
    if device is None:
        raise ValueError(f"backend 'gpu' cannot run: {reason}")
    return device


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Work on that GPU, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def free_memory() -> int:
    """Bytes that the GPU has left."""
    return torch.cuda.mem_get_info()[0]
