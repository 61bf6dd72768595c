from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import bitcpm_kernel_checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitcpm import PackedTensor, TernaryMatrix
from bitcpm.cpu_library import CODECS, LEVELS, MODES, kernels

pytestmark = pytest.mark.skipif(kernels()[0] is None, reason=kernels()[1])


@functools.cache
def run_at(level: str | None) -> list[str]:
    """[level in use, digest] of all checks in a process of its own."""
    env = {k: v for k, v in os.environ.items() if k != "BITCPM_CPU_LEVEL"}
    env |= {"OMP_NUM_THREADS": "1"} | ({"BITCPM_CPU_LEVEL": level} if level else {})
    program = Path(__file__).parent / "bitcpm_kernel_checks.py"
    done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_equals_the_oracles_and_the_others(level):
    best, digest = run_at(None)
    if LEVELS.index(level) > LEVELS.index(best):
        pytest.skip(f"this processor has {best}")
    assert run_at(level) == [level, digest]


def test_an_unknown_level_is_refused(monkeypatch):
    monkeypatch.setenv("BITCPM_CPU_LEVEL", "sse9")
    library, reason = kernels.__wrapped__()
    assert library is None and "must be one of scalar, avx2" in reason and "'sse9'" in reason


@settings(max_examples=60, deadline=None)
@given(
    O=st.integers(1, 300),
    I=st.integers(1, 600),
    g=st.sampled_from([-1, 1, 3, 32, 64, 100, 128, 256]),
    codec=st.sampled_from(sorted(CODECS)),
    other=st.sampled_from(sorted(CODECS)),
    T=st.integers(0, 9),
    by_group=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_products_of_any_shape(O, I, g, codec, other, T, by_group, seed):
    packed = bitcpm_kernel_checks.random_packed(O, I, g, torch.float32, codec, seed)
    matrix = TernaryMatrix.from_packed(packed, other)
    x = torch.randn(T, I, generator=torch.Generator().manual_seed(seed))
    out = matrix.multiply(x, None, "int8-group" if by_group else "int8")
    assert torch.equal(out, torch.from_numpy(bitcpm_kernel_checks.int8_oracle(x, packed, by_group)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("codec", CODECS)
def test_results_do_not_depend_on_threads_or_on_neighbours(codec, mode):
    packed = bitcpm_kernel_checks.random_packed(700, 500, 128, torch.bfloat16, codec)
    matrix = TernaryMatrix.from_packed(packed)
    x = torch.randn(40, 500)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = matrix.multiply(x, None, mode)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(matrix.multiply(x, None, mode), one)
        for size in (1, 2, 5, 12):
            parts = [matrix.multiply(part, None, mode) for part in x.split(size)]
            assert torch.equal(torch.cat(parts), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_any_stride_dims_and_bias(mode):
    packed = bitcpm_kernel_checks.random_packed(130, 96, 32, torch.float32, "1.6bit")
    matrix = TernaryMatrix.from_packed(packed)
    x, bias = torch.randn(2, 3, 192), torch.randn(130)
    for view in (x[..., :96], x[..., ::2], x.transpose(0, 1)[..., 96:]):
        out = matrix.multiply(view, bias, mode)
        assert out.shape == (*view.shape[:-1], 130)
        assert torch.equal(out, matrix.multiply(view.contiguous().reshape(-1, 96), bias, mode)
                           .reshape(out.shape))  # fmt: skip
        assert torch.equal(out, matrix.multiply(view, None, mode) + bias)
    assert matrix.multiply(x[:0, :, :96], bias, mode).shape == (0, 3, 130)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_shows(bad):
    packed = bitcpm_kernel_checks.random_packed(70, 96, 32, torch.float32, "1.6bit")
    matrix = TernaryMatrix.from_packed(packed)
    x = torch.randn(3, 96)
    x[1, 5] = bad
    for mode in ("int8", "int8-group"):
        out = matrix.multiply(x, None, mode)
        assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
    assert not matrix.multiply(x, None, "exact")[1].isfinite().all()


def test_tiny_and_zero_activations_give_zero():
    packed = bitcpm_kernel_checks.random_packed(70, 96, 32, torch.float32, "2bit")
    matrix = TernaryMatrix.from_packed(packed)
    for value in (0.0, 1e-38, 1e-44):
        x = torch.full((2, 96), value)
        assert torch.equal(matrix.multiply(x), torch.zeros(2, 70))


def test_errors_say_what_is_wrong():
    packed = bitcpm_kernel_checks.random_packed(70, 96, 32, torch.float32, "2bit")
    matrix = TernaryMatrix.from_packed(packed)
    with pytest.raises(ValueError, match=r"float \[\.\.\., 96\] on the CPU.*\[2, 95\]"):
        matrix.multiply(torch.randn(2, 95))
    with pytest.raises(ValueError, match="torch.int64"):
        matrix.multiply(torch.ones(2, 96, dtype=torch.int64))
    with pytest.raises(ValueError, match="mode must be one of int8, int8-group, exact; got 'fp4'"):
        matrix.multiply(torch.randn(2, 96), None, "fp4")
    with pytest.raises(ValueError, match=r"takes uint8 \[\d+\], got torch.uint8 \[7\]"):
        TernaryMatrix(torch.zeros(7, dtype=torch.uint8), (70, 96), 32, "2bit", torch.float32)


def test_bytes_are_those_of_the_documented_layout():
    """`csrc/args.h`, read independently: every row and column is where it says."""
    O, I, g = 330, 300, 250
    for codec in CODECS:
        packed = bitcpm_kernel_checks.random_packed(O, I, g, torch.float32, codec)
        codes, scales = packed.unpack()
        data = TernaryMatrix.from_packed(packed).data.numpy()
        found, at = torch.full((384, I), 9, dtype=torch.int8), 0
        # 6 blocks: strips of 2 in the 1.6bit layout, one panel; strips and panels of 1 in 2bit.
        panels = [[0, 2, 4]] if codec == "1.6bit" else [[b] for b in range(6)]
        width = 2 if codec == "1.6bit" else 1
        for panel in panels:
            for first, n, ends in ((0, 240, False), (240, 10, True), (250, 50, True)):
                for strip in panel:
                    step, vectors = (5, width) if codec == "1.6bit" else (16, 4)
                    for c in range(0, n, step):
                        for vector in range(vectors):
                            line = data[at : at + 64]
                            at += 64
                            _read(codec, line, vector, strip, first + c, first + n, found)
                    if ends:
                        for block in range(strip, strip + width):
                            here = torch.from_numpy(data[at : at + 256].view("float32").copy())
                            at += 256
                            rows = slice(block * 64, min(O, block * 64 + 64))
                            wanted = scales[rows, 0 if first < 250 else 1]
                            assert torch.equal(here[: len(wanted)], wanted)
                            assert not here[len(wanted) :].any()
        assert at == len(data)
        assert torch.equal(found[:O], codes) and not found[O:].any()


def _read(codec, line, vector, strip, column, end, found):
    for place, byte in enumerate(line.tolist()):
        if codec == "1.6bit":
            block_row = 16 * (place // 4 % 4) + 4 * (place // 16) + place % 4
            row, value = (strip + vector) * 64 + block_row, byte & 127
            value = -value if byte & 128 else value
            for i in range(5):
                digit = (value + 1) % 3 - 1
                value = (value - digit) // 3
                if column + i < end:
                    found[row, column + i] = digit
                else:
                    assert digit == 0
        else:
            row = strip * 64 + 16 * vector + place // 4
            for i in range(4):
                digit, c = (byte >> 2 * i & 3) - 1, column + 4 * i + place % 4
                if c < end:
                    found[row, c] = digit
                else:
                    assert digit == 0


def test_a_matrix_in_memory_that_is_not_aligned_is_copied():
    packed = bitcpm_kernel_checks.random_packed(70, 96, 32, torch.float32, "2bit")
    good = TernaryMatrix.from_packed(packed)
    shifted = torch.empty(good.data.numel() + 64, dtype=torch.uint8)
    shifted = shifted[(1 - shifted.data_ptr()) % 64 :][: good.data.numel()].copy_(good.data)
    assert shifted.data_ptr() % 64 == 1
    other = TernaryMatrix(shifted, (70, 96), 32, "2bit", torch.float32)
    x = torch.randn(2, 96)
    assert torch.equal(other.multiply(x), good.multiply(x))


def test_packed_tensors_of_a_kernel_layout_are_equal():
    w = torch.randn(100, 130).sign() * 0.5
    packed = PackedTensor.from_weights(w, 32)
    assert torch.equal(TernaryMatrix.from_packed(packed).to_packed().dequantise(), w)
    assert copy.copy(packed).codes is packed.codes
