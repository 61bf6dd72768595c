"""The small language model that judges text by being trained on it: packing, annealing, losses.

Any Hugging Face folder of a causal model with its tokenizer will do as the base. `make_base` trains
a small one from text, up to the end of the stable part of its schedule: nearly trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultraclean._files import atomic_path, write_json

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
    model: PreTrainedModel, batches: Batches, rate: Callable[[int], float], steps: int
) -> None:
    """AdamW on `steps` batches, in place; bfloat16 on a GPU.

    Args:
        model: on the device to train on.
        batches: what to train on.
        rate: step -> learning rate.
        steps: how many.
    """
    import torch
    from torch.nn import functional

    device = next(model.parameters()).device
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step)
        window = torch.from_numpy(batches(step)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=window[:, :-1]).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if not math.isfinite(float(loss.detach())):
            raise ValueError(f"training diverged at step {step}: lower the learning rate")
    model.eval()


def bits_per_byte(
    model: PreTrainedModel, packed: Packed, length: int, batch: int, windows: int
) -> float:
    """Loss on held-out text, in bits per byte of it; the same windows each time.

    Args:
        model: to be judged.
        packed: the text.
        length: tokens predicted in a window.
        batch: windows in a pass.
        windows: most windows, spread over the text.
    """
    import torch
    from torch.nn import functional

    device = next(model.parameters()).device
    whole = max(1, (len(packed.tokens) - 1) // length)
    chosen = np.unique(np.linspace(0, whole - 1, min(windows, whole)).astype(int)) * length
    total = count = 0.0
    with torch.inference_mode():
        for i in range(0, len(chosen), batch):
            rows = [packed.window(int(s), length) for s in chosen[i : i + batch]]
            window = torch.from_numpy(np.stack(rows)).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(input_ids=window[:, :-1]).logits
            total += float(functional.cross_entropy(
                logits.float().flatten(0, 1), window[:, 1:].flatten(), reduction="sum"
            ))  # fmt: skip
            count += window[:, 1:].numel()
    return total / count / math.log(2) * len(packed.tokens) / packed.bytes


def parameters(model: PreTrainedModel) -> int:
    """Weights that a token is multiplied with: all but the input embedding, unless it is tied."""
    total = sum(p.numel() for p in model.parameters())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return total if tied else total - model.get_input_embeddings().weight.numel()


def make_base(
    texts: Iterable[str],
    output: str | Path,
    *,
    width: int = 128,
    layers: int = 4,
    vocab_size: int = 4096,
    tokens: int = 1_000_000,
    batch: int = 16,
    length: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    progress: Callable[[int], None] = lambda step: None,
) -> Path:
    """Train a small Llama on the default mix at a constant rate, and write it with its tokenizer.

    With the defaults 1.4M weights, three minutes on two cores.

    Args:
        texts: the default mix.
        output: folder to write, atomically.
        width, layers, vocab_size: of the model.
        tokens: to train on.
        batch, length, lr, seed: of the training.
        progress: called with the steps done.

    Raises:
        ImportError: torch or transformers is missing.
    """
    torch, transformers = _libraries()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [t for t in texts if t.strip()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    packed = pack(texts, tokenizer)
    torch.manual_seed(seed)
    heads = max(1, width // 32)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 3,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        tie_word_embeddings=True, max_position_embeddings=4 * length,
        bos_token_id=0, eos_token_id=0,
    )).to(device())  # fmt: skip
    steps = max(1, tokens // (batch * length))

    def batches(step: int) -> np.ndarray:
        progress(step)
        draw = np.random.default_rng([seed, step])
        starts = draw.integers(0, len(packed.tokens), batch)
        return np.stack([packed.window(int(s), length) for s in starts])

    train(model, batches, lambda step: lr * min(1.0, (step + 1) / max(1, steps // 20)), steps)
    with atomic_path(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "base.json", {
            "tokens": steps * batch * length, "lr": lr, "parameters": parameters(model),
        })  # fmt: skip
    return Path(output)


def device() -> torch.device:
    """A GPU where there is one."""
    torch, _ = _libraries()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base in fp32 on the device, with its tokenizer.

    Raises:
        FileNotFoundError: no such folder. ImportError: torch or transformers is missing.
    """
    torch, transformers = _libraries()
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model: give a Hugging Face folder, or make one with make_base"
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: its tokenizer has no end-of-text token, which parts texts")
    return model.to(device()), tokenizer


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            "verification trains a model: pip install torch, then 'minicpm4-ultraclean[verify]'"
        ) from error
    return torch, transformers
