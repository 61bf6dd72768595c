"""Products as records for another program's threads."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bitcpm
from bitcpm.cpu_library import aligned_bytes, kernels
from bitcpm.records import ProductRecords, scratch_bytes

pytestmark = pytest.mark.skipif(kernels()[0] is None, reason="the CPU kernels were not built")
OPERATION = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)


def run(product, threads):
    """As an engine does: all threads through one operation, then the next."""
    with ThreadPoolExecutor(threads) as pool:
        for address, args in product.steps:
            call = OPERATION(address)
            assert not any(
                pool.map(lambda i, call=call, at=ctypes.addressof(args): call(at, i, threads),
                         range(threads))
            )  # fmt: skip


def made(rows=70, cols=300, group=64):
    torch.manual_seed(0)
    codes, scales = bitcpm.quantise(torch.randn(rows, cols), bitcpm.TernaryConfig(group_size=group))
    weight = bitcpm.dequantise(codes, scales, bitcpm.TernaryConfig(group_size=group))
    return bitcpm.TernaryMatrix.from_packed(bitcpm.PackedTensor.from_weights(weight, group))


@pytest.mark.parametrize("mode", ["int8", "int8-group", "exact"])
@pytest.mark.parametrize("threads", [1, 3])
def test_equal_the_matrix_s_own_product(mode, threads):
    matrix, most = made(), 40
    x, out, bias = torch.randn(most, 300), torch.empty(most, 70), torch.randn(70)
    scratch = aligned_bytes(scratch_bytes(matrix, most, threads, mode))
    product = ProductRecords(matrix, x, out, scratch, threads, bias=bias, mode=mode)
    for tokens in (most, 1, 17, 0):
        out.fill_(7.0)
        product.set_tokens(tokens)
        run(product, threads)
        assert torch.equal(out[:tokens], matrix.multiply(x[:tokens], bias, mode))
        assert (out[tokens:] == 7.0).all()


def test_wrong_memory_is_refused():
    matrix = made()
    x, out, scratch = torch.randn(4, 300), torch.empty(4, 70), aligned_bytes(1 << 20)
    with pytest.raises(ValueError, match=r"out must be contiguous float32 \[4, 70\]"):
        ProductRecords(matrix, x, out.double(), scratch, 1)
    with pytest.raises(ValueError, match=r"x must be contiguous float32 \[4, 300\]"):
        ProductRecords(matrix, x.T.contiguous().T, out, scratch, 1)
    with pytest.raises(ValueError, match="scratch must hold"):
        ProductRecords(matrix, x, out, scratch[:64], 1)
    with pytest.raises(ValueError, match=r"tokens must be in 0\.\.4"):
        ProductRecords(matrix, x, out, scratch, 1).set_tokens(5)
