"""A model and its tokenizer from a folder, checked before the weights, which take long to read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# One of these files makes a folder's tokenizer.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load_config(model: Path) -> Any:
    """The configuration of a model folder, without weights.

    Raises:
        FileNotFoundError: no folder with a config.json.
        ImportError: transformers is missing.
    """
    if not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(
            f"{model} does not exist, or is no folder of a transformers model (no config.json)"
        )
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ImportError("models need transformers: pip install 'minicpm4-locret[hf]'") from error
    try:
        return AutoConfig.from_pretrained(model, local_files_only=True)
    except OSError as error:
        raise ValueError(f"{model}/config.json cannot be read: {error}") from error


def load_model(
    model: Path, dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A decoder in eval mode on the GPU if there is one, and its tokenizer; nothing is downloaded.

    Raises:
        FileNotFoundError: no such folder, or one without a tokenizer.
        ValueError: an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    load_config(model)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not any((Path(model) / name).is_file() for name in _TOKENIZERS):
        raise FileNotFoundError(f"{model} holds no tokenizer: tokenizer.json is missing")
    logging.disable_progress_bar()
    decoder = AutoModelForCausalLM.from_pretrained(
        model, local_files_only=True, dtype=DTYPES[dtype]
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return decoder.eval().to(device), AutoTokenizer.from_pretrained(model, local_files_only=True)


def read_prompt(path: Path, tokenizer: PreTrainedTokenizerBase, most: int | None) -> torch.Tensor:
    """Tokens int64 `[1, n]` of a text file, cut after `most`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, or empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the prompt {path} does not exist, or is no file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :most]
    if not ids.shape[1]:
        raise ValueError(f"{path} is empty: a prompt needs at least one token")
    return ids
