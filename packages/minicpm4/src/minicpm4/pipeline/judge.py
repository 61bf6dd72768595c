"""An independent judge of text: the loss per byte of a language model that had no say in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path


def loss_per_byte(
    model_path: Path,
    texts: Sequence[str],
    *,
    longest: int = 384,
    progress: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Nats per UTF-8 byte of each text under a causal language model (bf16 weights, fp32 loss).

    Args:
        model_path: a transformers model folder.
        texts: texts of at least two tokens each; only the first `longest` tokens are judged.
        progress: called with the number of texts judged so far.

    Returns:
        one value for each text; the bytes are those of the judged tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.bfloat16, local_files_only=True
    ).eval()
    losses = []
    with torch.inference_mode():
        for index, text in enumerate(texts):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][:longest]
            judged = len(tokenizer.decode(ids[1:]).encode())
            if len(ids) < 2 or judged == 0:
                losses.append(math.nan)
                continue
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
            losses.append(loss.item() / judged)
            progress(index + 1)
    return losses
