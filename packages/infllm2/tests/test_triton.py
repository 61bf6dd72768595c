"""The Triton kernels against the reference, in Triton's interpreter, and on a GPU if there is one.

The interpreter runs a program in Python, so problems are small; `triton_checks` says what a check
does. Tests marked gpu are the same checks, compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_checks
from triton_checks import Case

BF16, FP16 = torch.bfloat16, torch.float16
Run = Callable[..., Any]

SELECTION = {
    "G 1": Case(130, 130, 1, 16),
    "G 2, exact": Case(150, 70, 2, 40, config={"lse": "exact"}),
    "G 3, no initial blocks, batch 2": Case(141, 40, 3, 16, B=2, config={"init_blocks": 0}),
    "G 5, one stride a kernel": Case(130, 33, 5, 16, config={"kernel_stride": 8}),
    "G 8, bfloat16": Case(200, 50, 8, 64, K=1, dtype=BF16),
    "G 16, bfloat16, exact": Case(170, 30, 16, 128, K=1, dtype=BF16, config={"lse": "exact"}),
    "G 17, float16, four strides a kernel": Case(
        150, 21, 17, 40, K=1, dtype=FP16, config={"kernel_stride": 2}
    ),
    "blocks of 72": Case(
        400, 50, 2, 16, K=1, config={"block_size": 72, "window_size": 72, "topk": 2}
    ),
    "blocks of a stride": Case(
        70, 70, 2, 16, K=1, config={"block_size": 4, "window_size": 4, "topk": 3}
    ),
    "several steps of blocks": Case(
        285, 25, 16, 16, sharp=4, config={"block_size": 4, "window_size": 12, "topk": 40}
    ),
    "several steps of kernels, exact": Case(
        285, 9, 3, 16, sharp=4, config={"block_size": 4, "topk": 30, "lse": "exact"}
    ),
    "decoding": Case(333, 1, 16, 64),
    "decoding, strided": Case(200, 3, 3, 16, B=2, dtype=BF16, strided=True),
    "nothing to choose": Case(100, 20, 2, 16, config={"init_blocks": 3}),
    "fewer keys than a kernel": Case(5, 5, 2, 16),
}


@pytest.mark.parametrize("name", SELECTION)
def test_selection_is_the_references(run: Run, name: str) -> None:
    run(triton_checks.selection, SELECTION[name])


PREFILL = {
    "G 1": Case(90, 70, 1, 16),
    "G 2": Case(100, 100, 2, 64, K=1),
    "G 3, batch 2": Case(75, 41, 3, 16, B=2),
    "G 5, bfloat16": Case(80, 33, 5, 40, dtype=BF16),
    "G 8, bfloat16": Case(150, 50, 8, 64, K=1, dtype=BF16),
    "G 16, bfloat16": Case(150, 31, 16, 128, K=1, dtype=BF16),
    "G 17, float16": Case(130, 19, 17, 40, K=1, dtype=FP16),
    "blocks of 72": Case(
        300, 40, 2, 16, K=1, config={"block_size": 72, "window_size": 72, "topk": 2}
    ),
    "blocks of 8, strided": Case(
        70, 37, 3, 16, dtype=BF16, strided=True, config={"block_size": 8, "window_size": 16}
    ),
    "fewer keys than a kernel": Case(5, 5, 2, 16),
    "one key": Case(1, 1, 1, 16, K=1),
}


@pytest.mark.parametrize("name", PREFILL)
def test_prefill_and_gradients(run: Run, name: str) -> None:
    run(triton_checks.without_splits, PREFILL[name])


DECODE = {
    "G 1": Case(100, 1, 1, 16, K=1),
    "G 3, batch 2, 3 tokens": Case(150, 3, 3, 40, B=2),
    "G 8, bfloat16": Case(150, 1, 8, 64, dtype=BF16),
    "G 16, bfloat16, strided": Case(150, 1, 16, 128, dtype=BF16, strided=True),
    "G 17, float16": Case(150, 2, 17, 40, K=1, dtype=FP16),
    "every block its own part": Case(200, 1, 2, 16, K=1, config={"topk": 14}),
}


@pytest.mark.parametrize("name", DECODE)
def test_decoding_and_gradients(run: Run, name: str) -> None:
    """Few tokens: the list of each is cut among programs, and the parts merged."""
    run(triton_checks.attention, DECODE[name])


def test_many_strips_and_chunks(run: Run) -> None:
    run(triton_checks.many_strips, Case(110, 35, 3, 16))
    run(triton_checks.many_strips, Case(150, 9, 1, 16, K=1, config={"lse": "exact"}))


def test_gradient_of_the_log_sum_exp(run: Run) -> None:
    run(triton_checks.gradient_of_lse, Case(70, 70, 3, 16))
    run(triton_checks.gradient_of_lse, Case(70, 2, 2, 16))
