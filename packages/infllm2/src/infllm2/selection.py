"""Which blocks to visit: the first step of InfLLM v2 (arXiv 2509.24663, sections 3.2 and 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from infllm2 import backends
from infllm2.checks import check_config, check_qk
from infllm2.compression import CompressedKeys, compress_keys
from infllm2.config import InfLLMv2Config
from infllm2.eager import eager
from infllm2.official import official_blocks


def select_blocks(q: Tensor, k: Tensor, config: InfLLMv2Config, *, backend: str = "auto") -> Tensor:
    """Choose the key blocks that each query visits: initial, window, and the best-scored others.

    One set per query and key-value head, shared by the heads of the group. Positions are absolute,
    so a query's set does not depend on how its prompt was cut into chunks (beyond rounding: scores
    are computed in float32, float64 for float64 inputs, and two blocks that tie to the last bit or
    two may swap between chunkings). No gradient flows through the choice.

    Args:
        q: queries `[B, Hq, T, D]`, the last T of S positions; float32, bfloat16, float16 or
            float64.
        k: keys `[B, Hkv, S, D]`, rotary embedding applied, same dtype.
        config: sizes and budget; `InfLLMv2Config` states the exact definition of the set.
        backend: "auto", or one of `infllm2.backends.ORDER`.

    Returns:
        int32 `[B, Hkv, T, config.budget]`: block indices ascending, then −1. Ties go to the lower
        index. Keys that are not finite make the scores they touch the lowest (NaN) or highest
        (inf); the set stays valid, and initial and window blocks are always in it.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the backend cannot run.
    """
    return blocks_of(q, k, config, backend=backend)


@eager
@torch.no_grad()
def blocks_of(
    q: Tensor,
    k: Tensor,
    config: InfLLMv2Config,
    *,
    keys: CompressedKeys | None = None,
    backend: str = "auto",
) -> Tensor:
    """As `select_blocks`, with the compressed keys where they are known already."""
    check_qk(q, k)
    check_config(config)
    keys = compressed(k, config) if keys is None else keys
    if config.compat == "official":
        if backend not in ("auto", "reference"):
            raise ValueError(
                'compat="official" is for comparison and runs in plain PyTorch, not on '
                f'{backend!r}: use backend="auto"'
            )
        return official_blocks(q, keys.fine, keys.coarse, keys.length, config)
    chosen = backends.choose(backend, backends.Inputs.of(q, k))
    return chosen.select(q, keys.fine, keys.coarse, keys.length, config)


def compressed(k: Tensor, config: InfLLMv2Config) -> CompressedKeys:
    """Compressed keys of k, none where no query can have a choice to make."""
    length = k.shape[2]
    if length <= config.budget * config.block_size:
        return CompressedKeys(k[:, :, :0], k[:, :, :0], length)
    return CompressedKeys(*compress_keys(k, config), length)
