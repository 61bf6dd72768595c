"""The GPU backend's kernels, in Triton's interpreter, and on a GPU if there is one."""

from __future__ import annotations

import gpu_checks
import pytest
import torch

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("bits", "group", "O", "I", "dtype"),
    [
        (4, 32, 35, 96, BF16),
        (4, 64, 33, 192, F32),
        (4, 128, 17, 128, FP16),
        (8, 32, 70, 96, F32),
        (8, 64, 1, 64, BF16),
        (8, 128, 5, 256, FP16),
        # Columns shared among programs, in one of them the last has none.
        (4, 32, 35, 4160, BF16),
        (8, 32, 35, 3104, F32),
    ],
)
def test_products(on_gpu, bits, group, O, I, dtype):
    on_gpu(gpu_checks.product, bits, group, O, I, dtype)


def test_products_of_what_does_not_fit_are_refused(on_gpu):
    on_gpu(gpu_checks.refused_products)
    on_gpu(gpu_checks.refused_strides)


@pytest.mark.parametrize(
    ("G", "K", "D", "dtype", "window"),
    [
        (1, 2, 16, F32, None),
        (3, 2, 40, F32, None),
        (8, 1, 64, BF16, None),
        (17, 1, 32, FP16, None),
        (2, 2, 16, F32, 50),
    ],
)
def test_attention_of_one_token(on_gpu, G, K, D, dtype, window):
    on_gpu(gpu_checks.decode, G, K, D, dtype, window)


@pytest.mark.parametrize(
    ("G", "K", "D", "dtype", "norm"),
    [(1, 2, 16, F32, False), (3, 2, 24, F32, True), (2, 1, 128, BF16, True)],
)
def test_rotation(on_gpu, G, K, D, dtype, norm):
    on_gpu(gpu_checks.rotation, G, K, D, dtype, norm)


@pytest.mark.parametrize(("T", "W", "dtype"), [(1, 96, F32), (37, 1000, F32), (5, 4100, BF16)])
def test_rows(on_gpu, T, W, dtype):
    on_gpu(gpu_checks.rows, T, W, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_compressed_keys_token_by_token(on_gpu, dtype):
    pytest.importorskip("infllm2")
    on_gpu(gpu_checks.compression, 2, 24, dtype)
