"""Trains a small base from text, to the end of its schedule's stable part: nearly trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ultraclean._files import atomic_path, write_json
from ultraclean.processes import launched
from ultraclean.proxy_model import device, libraries, pack, parameters, train


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
    micro: int = 0,
    progress: Callable[[int], None] = lambda step: None,
) -> Path:
    """Train a small Llama on the default mix at a constant rate, and write it with its tokenizer.

    With the defaults 1.4M weights, three minutes on two cores. Under torchrun or accelerate the
    processes train it together, and rank 0 writes it where all of them can read.

    Args:
        texts: the default mix.
        output: folder to write, atomically.
        width, layers, vocab_size: of the model.
        tokens: to train on.
        batch, length, lr, seed: of the training.
        micro: as for `train`.
        progress: called with the steps done.

    Raises:
        ImportError: torch or transformers is missing.
    """
    torch, transformers = libraries()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    processes = launched()
    texts = [t for t in texts if t.strip()]

    def learned() -> str:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["<|end|>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ))  # fmt: skip
        return bpe.to_str()

    bpe = Tokenizer.from_str(processes.agree(learned))
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
        if processes.writes:
            progress(step)
        draw = np.random.default_rng([seed, step])
        starts = draw.integers(0, len(packed.tokens), batch)
        return np.stack([packed.window(int(s), length) for s in starts])

    def rate(step: int) -> float:
        return lr * min(1.0, (step + 1) / max(1, steps // 20))

    train(model, batches, rate, steps, micro, processes)

    def save() -> None:
        with atomic_path(output) as folder:
            model.float().save_pretrained(folder)  # DeepSpeed leaves bfloat16 on a GPU
            tokenizer.save_pretrained(folder)
            write_json(folder / "base.json", {
                "tokens": steps * batch * length, "lr": lr, "parameters": parameters(model),
            })  # fmt: skip

    processes.agree(save)  # which the others wait for
    return Path(output)
