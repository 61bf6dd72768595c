"""The Triton kernels for NVIDIA GPUs (sm80 and later), offered as a backend.

Selection, prefill, split-KV decoding and a deterministic backward, for float32, bfloat16 and
float16, and any group and head size that fits into shared memory. Verified in Triton's interpreter
on a CPU against the reference, and compiled for sm80 and sm90; not run on a GPU by us, so neither
speed nor the behaviour of a real GPU was measured, and the tile sizes (`triton_launch`) are not
tuned.

Both steps are custom operators, opaque to `torch.compile`, with shapes and gradients declared.
Triton is imported when they first run.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from infllm2.backends import Inputs
from infllm2.backends.triton_launch import (
    attention_tiles,
    is_roomy,
    on_device,
    power_of_two,
    splits,
)
from infllm2.config import InfLLMv2Config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One token's queries of one group, padded to powers of two; with more, tiles do not fit into the
# shared memory of every GPU.
QUERY_BYTES = 16 << 10


class TritonBackend:
    """See `infllm2.backends.Backend`."""

    def is_supported(self, inputs: Inputs) -> tuple[bool, str]:
        """Whether the kernels know these inputs; CPU tensors only in Triton's interpreter."""
        if inputs.dtype not in DTYPES:
            return False, f"dtype must be one of {DTYPES}, got {inputs.dtype}"
        if inputs.head_dim > 256:
            return False, f"the head size must be at most 256, got {inputs.head_dim}"
        size = power_of_two(inputs.heads // inputs.kv_heads) * power_of_two(inputs.head_dim)
        if size * inputs.dtype.itemsize > QUERY_BYTES:
            return False, (
                f"{inputs.heads // inputs.kv_heads} heads of {inputs.head_dim} {inputs.dtype} in a "
                f"group are more than the {QUERY_BYTES >> 10} KiB that one program holds"
            )
        if inputs.device == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
            return False, "it runs on GPUs (on a CPU only for tests, with TRITON_INTERPRET=1)"
        if inputs.device not in ("cpu", "cuda"):
            return False, f"it runs on CUDA devices, got {inputs.device}"
        if not _has_triton():
            return False, "triton is not installed (pip install 'minicpm4-infllm2[triton]')"
        if inputs.device == "cuda" and _capability() < (8, 0):
            return False, "it needs a GPU of compute capability 8.0 or later"
        return True, ""

    def select(
        self, q: Tensor, fine: Tensor, coarse: Tensor, length: int, config: InfLLMv2Config
    ) -> Tensor:
        """Blocks `[B, K, T, budget]`; see the protocol."""
        return _select(
            q, fine, coarse, length, config.kernel_size, config.kernel_stride, config.block_size,
            config.init_blocks, config.window_blocks, config.topk, config.lse == "exact",
        )  # fmt: skip

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, block_size: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention over listed blocks, with autograd; see the protocol."""
        return _attend(q, k, v, blocks, block_size, scale)

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, fine: Tensor, coarse: Tensor, keys: Tensor,
        config: InfLLMv2Config,
    ) -> Tensor:  # fmt: skip
        """One token in launches that are the same for any number of keys; see the protocol."""
        from infllm2.backends import triton_selection

        with on_device(q):
            blocks = triton_selection.select(
                q, fine, coarse, k.shape[2], kernel_size=config.kernel_size,
                kernel_stride=config.kernel_stride, block_size=config.block_size,
                init_blocks=config.init_blocks, window_blocks=config.window_blocks,
                topk=config.topk, exact=config.lse == "exact", keys=keys,
            )  # fmt: skip
            scale = q.shape[3] ** -0.5
            return _launch(q, k, v, _lists(blocks), config.block_size, scale, keys)[0]


BACKEND = TritonBackend()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


@torch.library.custom_op("infllm2::triton_select", mutates_args=())
def _select(
    q: Tensor, fine: Tensor, coarse: Tensor, length: int, kernel_size: int, kernel_stride: int,
    block_size: int, init_blocks: int, window_blocks: int, topk: int, exact: bool,
) -> Tensor:  # fmt: skip
    from infllm2.backends import triton_selection

    with on_device(q):
        return triton_selection.select(
            q, fine, coarse, length, kernel_size=kernel_size, kernel_stride=kernel_stride,
            block_size=block_size, init_blocks=init_blocks, window_blocks=window_blocks,
            topk=topk, exact=exact,
        )  # fmt: skip


@_select.register_fake
def _(
    q: Tensor, fine: Tensor, coarse: Tensor, length: int, kernel_size: int, kernel_stride: int,
    block_size: int, init_blocks: int, window_blocks: int, topk: int, exact: bool,
) -> Tensor:  # fmt: skip
    shape = (q.shape[0], fine.shape[1], q.shape[2], topk + window_blocks)
    return q.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("infllm2::triton_attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    if q.numel() == 0 or blocks.shape[3] == 0:
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), lse
    with on_device(q):
        return _launch(q, k, v, _lists(blocks), block_size, scale)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, block_size: int, scale: float,
    keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over lists int32 `[B·K, T, n]`, shared among programs where there are few."""
    from infllm2.backends import triton_decode, triton_forward

    (B, H, T, D), K = q.shape, k.shape[1]
    parts = splits(B * K * T, lists.shape[2])
    tiles = attention_tiles(
        H // K, D, block_size, q.dtype, tokens=1 if parts > 1 else power_of_two(T)
    )
    sizes = {"block_size": block_size, "scale": scale, "tiles": tiles, "keys": keys}
    if parts > 1:
        return triton_decode.decode(q, k, v, lists, splits=parts, **sizes)
    return triton_forward.prefill(q, k, v, lists, **sizes)


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


@torch.library.custom_op("infllm2::triton_attend_backward", mutates_args=())
def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, out: Tensor, lse: Tensor,
    grad: Tensor, grad_lse: Tensor, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if q.numel() == 0 or blocks.shape[3] == 0:
        zeros = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        return zeros[0], zeros[1], zeros[2]
    from infllm2.backends import triton_backward

    G, D = q.shape[1] // k.shape[1], q.shape[3]
    tiles = attention_tiles(G, D, block_size, q.dtype, backward=True, roomy=is_roomy(q))
    with on_device(q):
        return triton_backward.backward(
            q, k, v, _lists(blocks), out, lse, grad, grad_lse,
            block_size=block_size, scale=scale, tiles=tiles,
        )  # fmt: skip


@_attend_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, out: Tensor, lse: Tensor,
    grad: Tensor, grad_lse: Tensor, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    return made[0], made[1], made[2]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, blocks, block_size, scale = inputs
    ctx.save_for_backward(q, k, v, blocks, *output)
    ctx.sizes = block_size, scale


def _gradients(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    made = _attend_backward(*ctx.saved_tensors, grad, grad_lse, *ctx.sizes)
    return *made, None, None, None


_attend.register_autograd(_gradients, setup_context=_save)


def _lists(blocks: Tensor) -> Tensor:
    """blocks `[B, K, T, n]` as the kernels read them: contiguous int32 `[B·K, T, n]`."""
    return blocks.flatten(0, 1).int().contiguous()
