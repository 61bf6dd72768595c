"""The conversion of the SmolLM2 GGUF into a Hugging Face folder, checked before it is kept."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ._files import atomic_path, sha256, write_json
from .real_model import MANIFEST_NAME, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_log = logging.getLogger(__name__)

# Raise it when what is written changes: cached folders of other converters are made again.
CONVERTER = 1

# The weights are kept in float32, because only that is lossless. A Q4_1 weight is d·q + m with two
# halves d and m and a q of 4 bits: of all values 52 % are exact in float16, 18 % in bfloat16.
# Measured on 812 tokens of prose, against float32: float16 moves log-probabilities by up to 0.036
# (KL 4e-6), bfloat16 by up to 0.18 (KL 7e-5). Tools here measure differences of that size, and
# would measure ours. It costs 538 MB of disk instead of 269.
_BYTES_NEEDED = 560 << 20

_NOT_OURS = ("quantization_config", "_name_or_path")

_PROBE = "The capital of France is Paris. In 1789 the revolution began, and 2 + 2 = 4."


def convert(gguf: Path, folder: Path) -> None:
    """Convert `gguf` to the folder `folder`: whole and checked, or not there at all.

    Kept only if the folder, loaded again, has the GGUF's weights bit for bit and the same logits.

    Raises:
        OSError: no space (errno ENOSPC), or not writable.
        RuntimeError: the folder does not reproduce the GGUF; a defect here or in transformers.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder.parent.mkdir(parents=True, exist_ok=True)
    _need_space(folder.parent)
    _log.info("converting %s to %s", gguf, folder)
    # Its own bar of dequantising stays: conversion takes long enough for one.
    with quiet_transformers():
        source = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        ).eval()
    tokenizer = _tokenizer(gguf)
    # transformers marks what it reads from a GGUF as quantised and will not save it. It is not.
    config = type(source.config).from_dict(
        {k: v for k, v in source.config.to_dict().items() if k not in _NOT_OURS}
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = source.generation_config

    with atomic_path(folder) as scratch:
        scratch.mkdir()
        with quiet_transformers():
            _save(model, scratch)
            tokenizer.save_pretrained(scratch)
            # safetensors makes its file readable to the owner only; a cache may be shared.
            (scratch / "model.safetensors").chmod((scratch / "config.json").stat().st_mode)
            again = AutoModelForCausalLM.from_pretrained(
                scratch, dtype=torch.float32, local_files_only=True
            ).eval()
        _check(source, again, AutoTokenizer.from_pretrained(scratch, local_files_only=True))
        files = sorted(p for p in scratch.iterdir() if p.is_file())
        write_json(
            scratch / MANIFEST_NAME,
            {
                "converter": CONVERTER,
                "gguf": {"name": gguf.name, "size": gguf.stat().st_size, "sha256": sha256(gguf)},
                "files": {f.name: {"size": f.stat().st_size, "sha256": sha256(f)} for f in files},
            },
        )


def _tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The GGUF's tokenizer, with the two things transformers does not take over from it."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, local_files_only=True
    )
    # `tokenizer.ggml.pre = smollm`: digits are split off one by one first. transformers builds
    # plain ByteLevel, which splits "a  1" (two spaces) otherwise than the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = 8192
    return tokenizer


def _save(model: PreTrainedModel, folder: Path) -> None:
    try:
        model.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        # safetensors wraps the system's error in its own class; its number is in the text only.
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            if f"os error {code}" in str(error):
                raise OSError(code, os.strerror(code), str(folder.parent.parent)) from error
        raise


def _need_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _BYTES_NEEDED:
        raise OSError(
            errno.ENOSPC,
            f"the model needs {_BYTES_NEEDED >> 20} MiB, {free >> 20} MiB are free; "
            "set TESTBED_CACHE to a folder on another disk",
            str(folder),
        )


def _check(
    source: PreTrainedModel, again: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    import torch

    ids = tokenizer(_PROBE, return_tensors="pt").input_ids
    if tokenizer.decode(ids[0]) != _PROBE:
        raise RuntimeError("the converted tokenizer does not give its input back")
    before, after = source.state_dict(), again.state_dict()
    wrong = sorted(before.keys() ^ after.keys())
    wrong += [k for k in before.keys() & after.keys() if not torch.equal(before[k], after[k])]
    if wrong:
        raise RuntimeError(f"converted weights differ from the GGUF's: {', '.join(wrong[:5])}")
    with torch.no_grad():
        error = (source(ids).logits - again(ids).logits).abs().max().item()
    # Same weights, same code: only the order of a parallel sum could differ.
    if not error < 1e-3:
        raise RuntimeError(f"converted model's logits differ from the GGUF's by {error:.2g}")
