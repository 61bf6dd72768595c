"""What needs no PyTorch, against the same with it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from bitcpm import PackedTensor, TernaryConfig, arrays, dequantise, quantise
from bitcpm.cpu_library import kernels
from bitcpm.group_size import fit_sizes
from bitcpm.packing import pack_codes


def ternary(rows, columns, group, seed=0):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    config = TernaryConfig(group_size=group)
    return dequantise(*quantise(w, config), config)


@pytest.mark.parametrize("codec", arrays.CODECS)
@pytest.mark.parametrize("columns", [8, 40, 41, 129])
def test_codes_come_back(codec, columns):
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(-1, 2, (7, columns), generator=generator, dtype=torch.int8)
    packed = pack_codes(codes, codec).numpy()
    assert np.array_equal(arrays.unpack(packed, columns, codec), codes.numpy())
    with pytest.raises(ValueError, match="does not use"):
        arrays.unpack(np.full_like(packed, 255), columns, codec)


@pytest.mark.parametrize(("columns", "group"), [(128, 32), (100, 32), (96, -1), (256, 64)])
def test_recovered_is_what_tensors_give(columns, group):
    w = ternary(24, columns, group)
    codes, scales, found = arrays.recover(w.numpy())
    assert found == fit_sizes(w).largest()
    packed = PackedTensor.from_weights(w, found)
    wanted_codes, wanted_scales = packed.unpack()
    assert np.array_equal(codes, wanted_codes.numpy())
    assert np.array_equal(scales, wanted_scales.numpy())
    assert np.array_equal(arrays.dequantise(codes, scales, found), w.numpy())


def test_what_is_not_ternary_is_not_recovered():
    w = ternary(24, 128, 32).numpy()
    assert arrays.recover(np.zeros((4, 64), np.float32)) is None
    assert arrays.recover(w[:, :7]) is None
    for odd in (0.123, np.nan, np.inf):
        damaged = w.copy()
        damaged[20, 5] = odd
        damaged[20, 6] = 1.0
        assert arrays.recover(damaged) is None


@pytest.mark.skipif(kernels()[0] is None, reason="the CPU kernels were not built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_laid_out_without_tensors(dtype):
    """The same bytes as `TernaryMatrix` lays out, in one thread's share after the other's."""
    import ctypes

    from bitcpm import TernaryMatrix
    from bitcpm.layout import LaidOut

    packed = PackedTensor.from_weights(ternary(50, 96, 32).to(getattr(torch, dtype)), 32)
    codes, scales = packed.unpack()
    bits = scales.view(torch.int16).numpy() if dtype == "bfloat16" else scales.numpy()

    def memory(size):
        whole = np.zeros(size + 64, np.uint8)
        return whole[-whole.ctypes.data % 64 :][:size]

    made = LaidOut(codes.numpy(), bits, dtype, 32, "1.6bit", memory)
    ((address, args),) = made.steps
    kind = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)
    for share in range(3):
        assert kind(address)(ctypes.addressof(args), share, 3) == 0
    assert np.array_equal(made.data, TernaryMatrix.from_packed(packed).data.numpy())


def test_the_modules_bring_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import bitcpm.arrays, bitcpm.entries, bitcpm.layout, bitcpm.records, bitcpm.cpu_library\n"
        "bitcpm.cpu_library.kernels()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(kernels()[0] is None, reason="the CPU kernels were not built")
def test_a_layout_wants_a_scale_for_each_group():
    from bitcpm.layout import LaidOut

    codes, scales = np.zeros((4, 64), np.int8), np.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match=r"need scales \(4, 2\).* got \(4, 3\)"):
        LaidOut(codes, scales, "float32", 32, "2bit", lambda size: np.empty(size, np.uint8))
