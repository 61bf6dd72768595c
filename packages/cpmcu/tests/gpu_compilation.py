"""Compiles the GPU backend's kernels for a GPU that is not here, run by test_gpu_compile.py.

Everything that a model of MiniCPM4's sizes launches; prints one JSON line for each machine code.
"""

from __future__ import annotations

import json
import sys

import torch

from cpmcu import triton_compress, triton_decode, triton_linear, triton_rotate, triton_rows
from cpmcu.gpu_weights import IntWeights
from cpmcu.sparse import SparseAttention
from testbed import triton_without_gpu

BF16 = torch.bfloat16


def weights(bits: int, group: int, O: int, I: int) -> IntWeights:
    codes = torch.zeros(O, I * bits // 8, dtype=torch.uint8 if bits == 4 else torch.int8)
    return IntWeights(codes, torch.zeros(O, I // group, dtype=torch.float16), bits)


def main(capability: int) -> None:
    triton_without_gpu.compile_only(capability, lambda line: print(json.dumps(line), flush=True))
    for bits, group in ((4, 32), (4, 128), (8, 32)):
        for O, tokens in ((4096, 1), (1024, 1), (4096, 16), (4096, 512)):
            x = torch.zeros(tokens, 1024, dtype=BF16)
            triton_linear.multiply(x, weights(bits, group, O, 1024))
    for G, K, D in ((16, 2, 128), (8, 2, 64)):
        k, v = torch.zeros(2, K, 32768, D, dtype=BF16)
        position = torch.zeros(1, dtype=torch.int64)
        triton_decode.decode(torch.zeros(G * K, D, dtype=BF16), k, v, position)
        arena, tables = torch.stack((k, v)), torch.zeros(2, 32768, 1, D, dtype=BF16)
        for T in (1, 512):
            qkv, norms = torch.zeros(T, (G * K + 2 * K) * D, dtype=BF16), tables[:, 0, 0]
            triton_rotate.rotate(qkv, tuple(norms), tuple(tables), position, arena, G * K, 1e-6)
            x = torch.zeros(T, G * K * D, dtype=BF16)
            triton_rows.add_norm(x, x, x[0], alpha=1.0, eps=1e-6)
            triton_rows.gated(x)
        compressed = (torch.zeros(K, n, D, dtype=BF16) for n in (2047, 511))
        triton_compress.compress(k, *compressed, position, SparseAttention())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]))
