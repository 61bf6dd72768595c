"""InfLLM v2 in PyTorch against torch's fused dense attention, selection included.

Random keys and queries: the time of block-sparse attention depends on the budget, not on which
blocks are chosen. Decode is here although it loses.
"""

from __future__ import annotations

import torch
from harness import Case, main
from torch.nn.functional import scaled_dot_product_attention as sdpa

import infllm2


def case(tokens: int, queries: int, window: int, topk: int, heads=(9, 3), dim: int = 64) -> Case:
    """Attention of `queries` last positions over `tokens`, at SmolLM2's shape by default."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads[0], queries, dim, generator=generator)
    k, v = (torch.randn(1, heads[1], tokens, dim, generator=generator) for _ in range(2))
    config = infllm2.InfLLMv2Config(window_size=window, topk=topk, dense_len=-1)

    def ours() -> torch.Tensor:
        with torch.inference_mode():
            return infllm2.infllmv2_attention(q, k, v, config)

    def dense() -> torch.Tensor:
        with torch.inference_mode():
            return sdpa(q, k, v, is_causal=queries > 1, enable_gqa=True)

    def check(sparse: torch.Tensor, _: torch.Tensor) -> None:
        blocks = infllm2.select_blocks(q[:, :, -8:], k, config)
        wanted = infllm2.block_sparse_attention(q[:, :, -8:], k, v, blocks, backend="reference")
        error = (sparse[:, :, -8:] - wanted).abs().max().item()
        assert error < 1e-5, f"differs from the reference by {error}"

    what = "prefill" if queries > 1 else "decode"
    name = f"{what} {tokens}, {heads[0]}/{heads[1]}×{dim}, window {window} + {topk} blocks"
    return Case(name, "queries/s", queries, ours, dense, "torch SDPA", check)


if __name__ == "__main__":
    main(
        "infllm2",
        [
            case(4096, 4096, 512, 16),
            case(8192, 8192, 512, 16),
            case(8192, 8192, 1024, 16),
            case(16384, 16384, 1024, 16),
            case(8192, 1, 512, 16),
            case(32768, 1, 512, 16),
        ],
    )
