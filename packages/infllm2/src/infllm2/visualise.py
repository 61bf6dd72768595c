"""Pictures of which blocks a prompt's tokens visited. Only the picture itself needs matplotlib."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from infllm2.config import InfLLMv2Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# One of these files makes a folder's tokenizer.
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
)


def visited_map(blocks: Tensor, T: int, S: int, block_size: int) -> np.ndarray:
    """How much each block of queries visited each block of keys.

    Args:
        blocks: int `[Hkv, T, n]` or `[B, Hkv, T, n]`, −1 for none, as from `select_blocks` or
            `Trace.blocks`.
        T: queries, the last of S positions; must be the blocks' own.
        S: keys.
        block_size: tokens per block.

    Returns:
        float64 `[query blocks, key blocks]` with ⌈S / block_size⌉ of each: the share, 0 … 1, of
        (query, key-value head) pairs that visited; NaN where the key block comes later or no query
        is known.

    Raises:
        ValueError: shapes do not fit together.
    """
    if blocks.dim() not in (3, 4) or blocks.shape[-2] != T or T > S:
        raise ValueError(
            f"blocks must be [Hkv, T, n] or [B, Hkv, T, n] with T={T} queries of S={S} positions, "
            f"got {tuple(blocks.shape)}"
        )
    rows = blocks.reshape(-1, T, blocks.shape[-1]).long()
    count = -(-S // block_size)
    if rows.numel() and int(rows.max()) >= count:
        raise ValueError(
            f"blocks names block {int(rows.max())}, but {S} keys make {count} blocks of "
            f"{block_size}: was block_size another when they were selected?"
        )
    own = torch.arange(S - T, S) // block_size
    visits = torch.zeros(count, count + 1)
    # The spare column takes the −1 entries.
    slots = torch.where(rows < 0, count, rows)
    pairs = (own[None, :, None] * (count + 1) + slots).flatten()
    visits.view(-1).index_add_(0, pairs, torch.ones(pairs.numel()))
    queries = torch.bincount(own, minlength=count)[:, None] * rows.shape[0]
    share = (visits[:, :count].double() / queries).numpy()
    later = np.arange(count)[None, :] > np.arange(count)[:, None]
    share[later | (queries.numpy() == 0)] = np.nan
    return share


def plot_visited(
    share: np.ndarray, block_size: int, *, title: str = "", needle: int | None = None
) -> Figure:
    """Draw a map of `visited_map`: queries downwards, keys to the right, darker where visited more.

    Args:
        share: `[query blocks, key blocks]`, 0 … 1, NaN where there is nothing to show.
        block_size: tokens per block, for the axes.
        title: text above the picture.
        needle: a token position to mark among the keys, such as that of a sought passage.

    Returns:
        A matplotlib figure that belongs to no window; save it with `figure.savefig(path)`.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = _figure_class()(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.subplots()
    tokens = share.shape[1] * block_size
    image = axes.imshow(
        share,
        cmap="Blues",
        vmin=0,
        vmax=1,
        extent=(0, tokens, share.shape[0] * block_size, 0),
        interpolation="nearest",
    )
    if needle is not None:
        axes.axvline(needle, color="tab:red", linewidth=0.8, label=f"token {needle}")
        axes.legend(loc="upper right")
    axes.set_xlabel("key position (tokens)")
    axes.set_ylabel("query position (tokens)")
    axes.set_title(title)
    figure.colorbar(image, label="share of queries that visit the block")
    return figure


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    return Figure


def _read_prompt(model: Path, prompt_file: Path, output: Path) -> str:
    """The prompt, once everything that takes no time to check is there."""
    if not (model / "config.json").is_file():
        raise FileNotFoundError(
            f"{model} does not exist, or is no folder of a transformers model (no config.json)"
        )
    if not any((model / name).is_file() for name in _TOKENIZERS):
        raise FileNotFoundError(f"{model} holds no tokenizer: none of {', '.join(_TOKENIZERS)}")
    if not prompt_file.is_file():
        raise FileNotFoundError(f"the prompt {prompt_file} does not exist, or is no file")
    if output.is_dir() or not output.parent.is_dir():
        raise FileNotFoundError(f"cannot write {output}: name a file in a folder that exists")
    try:
        return prompt_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompt_file} is not UTF-8 text: {error}") from error


def draw_prompt(
    model: Path,
    prompt_file: Path,
    output: Path,
    config: InfLLMv2Config,
    *,
    layer: int = -1,
    max_tokens: int = 8192,
) -> dict[str, float]:
    """Run a model over a text, sparse, and write the picture of one layer's visits.

    Args:
        model: folder of a transformers decoder with its tokenizer; nothing is downloaded.
        prompt_file: UTF-8 text.
        output: PNG file, written whole or not at all.
        config: sizes and budget; set `dense_len=-1`, or short prompts run dense and show nothing.
        layer: layer to draw, negative from the last.
        max_tokens: the prompt is cut after so many tokens.

    Returns:
        `layer`, `tokens`, and `visited_share` of that layer, 0 … 1.

    Raises:
        FileNotFoundError: the model, its tokenizer, the prompt or the output's folder is missing.
        ValueError: an empty prompt or one that is not text, no such layer, or nothing sparse to
            draw.
        ImportError: transformers or matplotlib is missing.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, got {max_tokens}")
    text = _read_prompt(model, prompt_file, output)
    _figure_class()
    from infllm2 import hf

    hf.register()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # Cheap questions first: weights take long to read.
    try:
        model_config = AutoConfig.from_pretrained(model, local_files_only=True)
    except OSError as error:
        raise ValueError(f"{model}/config.json cannot be read: {error}") from error
    layers = model_config.get_text_config().num_hidden_layers
    if not -layers <= layer < layers:
        raise ValueError(f"layer must lie in {-layers} … {layers - 1}, got {layer}")
    layer %= layers
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :max_tokens]
    if ids.shape[1] < 2:
        raise ValueError(f"{prompt_file} holds {ids.shape[1]} tokens: give a longer prompt")
    decoder = AutoModelForCausalLM.from_pretrained(model, local_files_only=True, dtype="auto")
    with torch.no_grad(), hf.sparse(decoder.eval(), config, keep_blocks=True) as trace:
        decoder(ids, logits_to_keep=1)
    tokens = ids.shape[1]
    share = visited_map(trace.blocks(layer), tokens, tokens, config.block_size)
    visited = trace.by_layer()[layer]["visited_share"]
    title = f"layer {layer}: {visited:.0%} of the causal blocks visited"
    picture = io.BytesIO()
    plot_visited(share, config.block_size, title=title).savefig(picture, format="png", dpi=150)
    part = output.with_name(output.name + ".part")
    part.write_bytes(picture.getvalue())
    os.replace(part, output)
    return {"layer": layer, "tokens": tokens, "visited_share": visited}
