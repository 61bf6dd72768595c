"""The small language model that judges text by being trained on it: packing, annealing, losses.

Any Hugging Face folder of a causal model with its tokenizer will do as the base; base_model.py
makes one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultraclean.processes import Alone, launched

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Batches = Callable[[int], np.ndarray]
"""Step -> token ids `[batch, length + 1]`."""


@dataclass(frozen=True)
class Packed:
    """Texts as one stream of tokens, each text ended by the end-of-text token.

    Attributes:
        tokens: int64 `[tokens]`.
        bytes: of the texts in UTF-8: what a loss is divided by, so that tokenizers compare.
    """

    tokens: np.ndarray
    bytes: int

    def window(self, start: int, length: int) -> np.ndarray:
        """`length + 1` tokens from `start` on, around the end where there are too few."""
        return self.tokens[(start + np.arange(length + 1)) % len(self.tokens)]


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, most: int = 0) -> Packed:
    """Tokenise texts; stop after `most` tokens, 0 for all.

    Raises:
        ValueError: no text with a token in it.
    """
    end = tokenizer.eos_token_id
    parts: list[list[int]] = []
    size = count = 0
    batch: list[str] = []

    def flush() -> None:
        nonlocal size, count
        for text, ids in zip(batch, tokenizer(batch, add_special_tokens=False)["input_ids"],
                             strict=True):  # fmt: skip
            if most and count >= most:
                break
            parts.append([*ids, end])
            count += len(ids) + 1
            size += len(text.encode("utf-8", "replace"))
        batch.clear()

    for text in texts:
        if text.strip():
            batch.append(text)
        if len(batch) == 200:
            flush()
            if most and count >= most:
                break
    if batch:
        flush()
    if not count:
        raise ValueError("no text to train or measure on: a pool or an evaluation is empty")
    return Packed(np.array([i for ids in parts for i in ids], np.int64), size)


def train(
    model: PreTrainedModel,
    batches: Batches,
    rate: Callable[[int], float],
    steps: int,
    micro: int = 0,
    processes: Alone | None = None,
) -> None:
    """AdamW on `steps` batches, in place; bfloat16 on a GPU.

    Args:
        model: on the device to train on; the same on each process.
        batches: what to train on: of each step's, every process takes its share.
        rate: step -> learning rate.
        steps: how many.
        micro: most windows in a pass, for memory's sake; 0, all of a process's share.
        processes: that train it together; those that were launched.

    Raises:
        ValueError: a batch that the processes cannot share evenly, or training that diverges.
    """
    import torch
    from torch.nn import functional

    processes = processes or launched()
    device = next(model.parameters()).device
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser: Any = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    whole = len(batches(0))
    rows, rest = divmod(whole, processes.count)
    if rest:
        raise ValueError(
            f"batch ({whole} windows) must be a multiple of the number of processes "
            f"({processes.count}): change one of them"
        )
    # Passes of equal size, so that the mean of their means is the mean.
    passes = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= (micro or rows))
    model.train()
    trained, optimiser = processes.prepare(model, optimiser, rows // passes, passes)
    casts = device.type == "cuda" and processes.casts
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step)
        for i, part in enumerate(np.split(processes.share(batches(step)), passes)):
            window = torch.from_numpy(part).to(device)
            with processes.one_pass(trained):
                with torch.autocast(device.type, torch.bfloat16, enabled=casts):
                    logits = trained(input_ids=window[:, :-1]).logits
                loss = functional.cross_entropy(
                    logits.float().flatten(0, 1), window[:, 1:].flatten()
                )
                processes.update(trained, optimiser, loss, last=i == passes - 1)
            if not math.isfinite(float(loss.detach())):
                raise ValueError(f"training diverged at step {step}: lower the learning rate")
    model.eval()
    del trained, optimiser
    processes.release()


def bits_per_byte(
    model: PreTrainedModel,
    packed: Packed,
    length: int,
    batch: int,
    windows: int,
    processes: Alone | None = None,
) -> float:
    """Loss on held-out text, in bits per byte of it; the same windows each time.

    Args:
        model: to be judged.
        packed: the text.
        length: tokens predicted in a window.
        batch: windows in a pass.
        windows: most windows, spread over the text.
        processes: that measure it together; those that were launched.
    """
    import torch
    from torch.nn import functional

    processes = processes or launched()
    device = next(model.parameters()).device
    whole = max(1, (len(packed.tokens) - 1) // length)
    chosen = np.unique(np.linspace(0, whole - 1, min(windows, whole)).astype(int)) * length
    mine = processes.share(chosen)
    total = count = 0.0
    with torch.inference_mode():
        for i in range(0, len(mine), batch):
            rows = [packed.window(int(s), length) for s in mine[i : i + batch]]
            window = torch.from_numpy(np.stack(rows)).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(input_ids=window[:, :-1]).logits
            total += float(functional.cross_entropy(
                logits.float().flatten(0, 1), window[:, 1:].flatten(), reduction="sum"
            ))  # fmt: skip
            count += window[:, 1:].numel()
    total, count = processes.total(total, count)
    return total / count / math.log(2) * len(packed.tokens) / packed.bytes


def parameters(model: PreTrainedModel) -> int:
    """Weights that a token is multiplied with: all but the input embedding, unless it is tied."""
    total = sum(p.numel() for p in model.parameters())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return total if tied else total - model.get_input_embeddings().weight.numel()


def device() -> torch.device:
    """A GPU where there is one."""
    torch, _ = libraries()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base in fp32 on the device, with its tokenizer.

    Raises:
        FileNotFoundError: no such folder. ImportError: torch or transformers is missing.
    """
    torch, transformers = libraries()
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model: give a Hugging Face folder, or make one with make_base"
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: its tokenizer has no end-of-text token, which parts texts")
    return model.to(device()), tokenizer


def libraries() -> tuple[Any, Any]:
    """torch and transformers; ImportError with the fix where they are missing."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            "verification trains a model: pip install torch, then 'minicpm4-ultraclean[verify]'"
        ) from error
    return torch, transformers
